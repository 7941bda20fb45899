-- The database of the example: made by its owner, before any agent comes.
CREATE TABLE customers (id int PRIMARY KEY, name text NOT NULL, email text NOT NULL UNIQUE, card text NOT NULL);
INSERT INTO customers VALUES
  (1, 'Ada', 'ada@example.com', '4111111111111111'),
  (2, 'Grace', 'grace@example.com', '5500005555555559');
CREATE TABLE orders (id int PRIMARY KEY, customer int NOT NULL REFERENCES customers, status text NOT NULL);
INSERT INTO orders VALUES (1, 1, 'paid'), (2, 2, 'paid'), (3, 1, 'stale');
