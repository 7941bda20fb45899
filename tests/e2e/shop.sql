-- The database of the end-to-end tests. Every masked text holds the word that no masked client may ever receive.
CREATE TABLE customers (
  id int PRIMARY KEY, name text NOT NULL, email text NOT NULL UNIQUE, card text NOT NULL, code varchar(40), salary int);
INSERT INTO customers VALUES
  (1, 'Ada', 'ada-cleartext@example.com', '4929cleartext1111', 'cleartext-a', 918273),
  (2, 'Grace', 'grace-cleartext@example.com', '5500cleartext5559', 'cleartext-b', 918274),
  (3, 'Ünal', 'unal-cleartext@example.com', '6011cleartext0004', NULL, NULL);
CREATE TABLE orders (id int PRIMARY KEY, customer int NOT NULL REFERENCES customers, status text NOT NULL);
INSERT INTO orders VALUES (1, 1, 'paid'), (2, 2, 'paid'), (3, 1, 'stale');
CREATE TABLE notes (id int PRIMARY KEY, body text);
CREATE VIEW contacts AS SELECT id, name, lower(email) AS mail FROM customers;
CREATE VIEW names AS SELECT id, name FROM customers;
CREATE TYPE mood AS ENUM ('sad', 'happy');
CREATE TYPE pair AS (first int, second text);
