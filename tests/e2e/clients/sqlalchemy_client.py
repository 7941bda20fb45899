"""What SQLAlchemy on psycopg sees: `sqlalchemy_client.py SCENARIO`. The connection is told by libpq's own variables."""

import sys
from concurrent.futures import ThreadPoolExecutor

import sqlalchemy as sa
from sqlalchemy import exc, orm
from transcript import say

URL = "postgresql+psycopg://"


class Base(orm.DeclarativeBase):
    metadata = sa.MetaData(schema="public")


class Author(Base):
    __tablename__ = "authors"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str] = orm.mapped_column(sa.String(40), unique=True)
    extra: orm.Mapped[dict | None] = orm.mapped_column(sa.JSON)
    books: orm.Mapped[list["Book"]] = orm.relationship(back_populates="author", order_by="Book.id")


class Book(Base):
    __tablename__ = "books"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    title: orm.Mapped[str]
    author_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("public.authors.id"), index=True)
    author: orm.Mapped[Author] = orm.relationship(back_populates="books")


def mapped() -> None:
    engine = sa.create_engine(URL)
    Base.metadata.create_all(engine)
    try:
        with orm.Session(engine) as session:
            session.add_all(
                Author(name=f"a{n}", extra={"n": n}, books=[Book(title=f"t{n}-{b}") for b in range(3)])
                for n in range(20)
            )
            session.commit()
            say(
                [
                    (author.name, author.extra, [book.title for book in author.books])
                    for author in session.scalars(sa.select(Author).limit(3))
                ]
            )
            with session.begin_nested() as nested:
                session.add(Author(name="undone"))
                session.flush()
                nested.rollback()
            try:
                with session.begin_nested():
                    session.add(Author(name="a1"))
                    session.flush()
            except exc.IntegrityError as error:
                say(type(error.orig).__name__, str(error.orig))
            say(session.scalar(sa.select(sa.func.count()).select_from(Author)))
            say(
                session.execute(
                    sa.update(Author).where(Author.name == "a2").values(name="b2").returning(Author.name)
                ).all()
            )
            session.rollback()
            joined = (
                sa.select(Author.name, sa.func.count(Book.id)).join(Book).group_by(Author.name).order_by(Author.name)
            )
            say([tuple(row) for row in session.execute(joined)][:4])
        with engine.connect().execution_options(stream_results=True, yield_per=10) as connection:
            say([row.title for row in connection.execute(sa.select(Book.title).order_by(Book.id))][-2:])
        with engine.connect().execution_options(isolation_level="SERIALIZABLE") as connection:
            say(connection.scalar(sa.text("SHOW transaction_isolation")))
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            say(connection.execute(sa.text("DELETE FROM public.books")).rowcount)
    finally:
        Base.metadata.drop_all(engine)
    engine.dispose()


def reflected() -> None:
    engine = sa.create_engine(URL)
    inspector = sa.inspect(engine)
    say(inspector.get_table_names(), sorted(inspector.get_view_names()), inspector.get_schema_names())
    for table in ("customers", "orders"):
        say(inspector.get_columns(table), inspector.get_pk_constraint(table), inspector.get_foreign_keys(table))
        say(
            inspector.get_indexes(table),
            inspector.get_unique_constraints(table),
            inspector.get_check_constraints(table),
        )
    say(inspector.get_enums(), inspector.get_view_definition("names"))
    say([column.name for column in sa.Table("orders", sa.MetaData(), autoload_with=engine).columns])
    engine.dispose()


def pooled() -> None:
    engine = sa.create_engine(URL, pool_size=8, max_overflow=4, pool_pre_ping=True)

    def work(number: int) -> int:
        with engine.begin() as connection:
            return int(connection.scalar(sa.text("SELECT :n * 2"), {"n": number}))

    with ThreadPoolExecutor(12) as threads:
        say(sum(threads.map(work, range(200))))
    engine.dispose()


def run(statement: str) -> None:
    """One statement and its end: the session goes on."""
    engine = sa.create_engine(URL)
    with engine.connect() as connection:
        try:
            say([tuple(row) for row in connection.execute(sa.text(statement))])
        except exc.DBAPIError as error:
            say(error=type(error).__name__, sqlstate=error.orig.sqlstate, message=str(error.orig))
        connection.rollback()
        say(connection.scalar(sa.text("SELECT 'alive'")))
    engine.dispose()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
