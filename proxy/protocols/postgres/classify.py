"""Says what a SQL string does, from PostgreSQL's own grammar: statement kinds, relations, functions, and where columns
are named. Knows no catalog: what only the server can tell is reported in the direction that is denied.

The parse tree comes as JSON (an order faster than syntax objects) and is walked once. Every node type is either
handled, or listed as one whose children say everything; any other makes the string `Unclassified`.

**Names.** A name that a WITH clause makes is no relation inside its scope and nowhere else. Functions are found as
calls, as operators outside of pg_catalog, as sampling methods, and as `value.function`, which PostgreSQL takes for
`function(value)` when there is no such column: unsafe built-in functions always count then, others where the value is
no row.

**Where a masked value could leave.** RowDescription traces plain output columns of the outermost query through
sub-selects, WITH queries and joins to their table. So a column counts as *exposed* wherever it is named otherwise:

- in any expression, condition, join, grouping, order (by ordinal as well), partition, conflict or locking clause;
- in the target list of a query whose values go on unseen: a scalar or IN sub-select, a branch of a set operation, the
  source of INSERT, CREATE TABLE AS, SELECT INTO, CREATE VIEW or COPY; and under DISTINCT, which compares;
- under another name: if an alias is exposed, so is what it stands for.

Where values leave without any column's name, the statement is *opaque*: a whole row (`t`, `t.*` in an expression,
`row_to_json(t)`, `(t).a`, `t.row_to_json`), `*` in one of the places above, columns renamed by position (`t AS a(x,
y)`, `WITH a(x) AS`), NATURAL JOIN, an ordinal behind `*`, COPY without columns, a BINARY cursor.

Blind spots: a function of the user's that takes a row and is called as `t.function`; an operator, cast or function of
the user's that overloads a built-in one; what functions, views, rules and triggers do inside; DO and function bodies,
which are reported as kinds of their own.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from pglast.parser import ParseError, parse_sql_json

from proxy.model import Relation, StatementFacts
from proxy.protocols.postgres import builtins

MAX_CHARACTERS = 1 << 20
"""Length of a string that is looked at; a longer one is unclassified, since it would stop the worker for too long."""

BINARY_CURSOR = 1
"""CURSOR_OPT_BINARY (src/include/nodes/parsenodes.h)."""

Node = Any
"""A piece of the JSON tree: `{"Tag": {...}}`, a bare struct, a list or a scalar."""

Names = frozenset[str]


class Unclassified(Exception):
    """The string cannot be classified; the message says why, for people."""


class Ungrammatical(Unclassified):
    """PostgreSQL's grammar does not take it."""


class Role(enum.Enum):
    """What becomes of the columns that a query puts out."""

    OUTER = enum.auto()
    """They are the statement's rows, traced by RowDescription."""
    SOURCE = enum.auto()
    """They are looked at by name from outside: FROM, WITH."""
    VALUE = enum.auto()
    """They go on as values that nothing traces."""
    EXISTS = enum.auto()
    """Nobody looks at them."""


_decode = msgspec.json.Decoder().decode


def classify(text: str) -> tuple[StatementFacts, ...]:
    """The facts of each statement in order; none for an empty string. Raises `Unclassified`, and nothing else."""
    if len(text) > MAX_CHARACTERS:
        raise Unclassified(f"the statement has `{len(text)}` characters, more than `{MAX_CHARACTERS}`")
    if "\0" in text:
        raise Unclassified("the text holds a NUL character")
    try:
        tree = _decode(parse_sql_json(text))
        return tuple(_statement(entry["stmt"]) for entry in tree.get("stmts", ()))
    except ParseError as error:
        # The rest quotes the text, which may be a secret.
        said = str(error.args[0]).partition(" at or near")[0]
        raise Ungrammatical(f"PostgreSQL's grammar does not take it: {said}") from None
    except RecursionError:
        raise Unclassified("the statement is nested too deeply") from None
    except (UnicodeError, ValueError, msgspec.MsgspecError) as error:
        raise Unclassified(f"the text cannot be read: {error}") from None
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise Unclassified(f"the statement has a form that is not known: {type(error).__name__}") from None


def _statement(node: Node) -> StatementFacts:
    ((tag, body),) = node.items()
    handler = _STATEMENTS.get(tag)
    if handler is None:
        raise Unclassified(f"statements of the kind `{tag}` are not known")
    return handler(tag, body)


# --- the walk ---------------------------------------------------------------------------------------------------------

_NOTHING: Names = frozenset()


class _Walk:
    """What has been found in one statement so far."""

    __slots__ = (
        "aliases",
        "also",
        "bare",
        "dotted",
        "exposed",
        "functions",
        "locks",
        "opaque",
        "output",
        "reads",
        "rows",
        "scalars",
        "writes",
    )

    def __init__(self) -> None:
        self.reads: set[Relation] = set()
        self.writes: set[Relation] = set()
        self.functions: set[str] = set()
        self.output: set[str] = set()
        self.exposed: set[str] = set()
        self.opaque: dict[str, None] = {}
        self.also: list[StatementFacts] = []
        self.aliases: dict[str, set[str]] = {}
        # Names that stand for a row, and for what a function in FROM returns (with the columns it is known to have).
        self.rows: set[str] = set()
        self.scalars: dict[str, set[str]] = {}
        # Columns written as `name` and as `qualifier.name`.
        self.bare: set[str] = set()
        self.dotted: set[tuple[str, str]] = set()
        self.locks = False

    def facts(self, kind: str, **more: Any) -> StatementFacts:
        """What was found, with what can only be told once all of it is known."""
        for name in self.bare & self.rows:
            self.opaque[f"the whole row `{name}`"] = None
        for qualifier, name in self.dotted:
            if name in builtins.ROW_FUNCTIONS:
                self.opaque[f"`{qualifier}.{name}`, which can be a function of the whole row,"] = None
            if name in builtins.UNSAFE_FUNCTIONS or (
                qualifier in self.scalars
                and name not in self.scalars[qualifier]
                and name not in builtins.RESULT_COLUMNS
            ):
                self.functions.add(name)
        pending = list(self.exposed) if self.aliases else ()
        while pending:
            for column in self.aliases.pop(pending.pop(), ()):
                if column not in self.exposed:
                    self.exposed.add(column)
                    pending.append(column)
        if self.locks:
            self.also.append(StatementFacts("select-for-update", writes=frozenset(self.reads)))
        return StatementFacts(
            kind,
            reads=frozenset(self.reads),
            writes=frozenset(self.writes),
            functions=frozenset(self.functions),
            output_columns=frozenset(self.output),
            exposed_columns=frozenset(self.exposed),
            opaque=tuple(self.opaque),
            also=tuple(self.also),
            **more,
        )

    # expressions

    def visit(self, node: Node, env: Names) -> None:
        """Any node where it stands for a value, and everything below it."""
        if type(node) is list:
            for item in node:
                self.visit(item, env)
            return
        if type(node) is not dict:
            return
        if len(node) == 1:
            ((tag, body),) = node.items()
            if tag in _LEAVES:
                return
            handler = _EXPRESSIONS.get(tag)
            if handler is not None:
                handler(self, body, env)
                return
            if tag[0].isupper():
                if tag not in _WALKED:
                    raise Unclassified(f"the grammar's node `{tag}` is not known")
                node = body
        if "relname" in node:
            self.writes.add(_relation(node))
            return
        for child in node.values():
            if type(child) is dict or type(child) is list:
                self.visit(child, env)

    def visit_column(self, body: Node, env: Names) -> None:
        name = self.column(body)
        if name is None:
            self.opaque["`*` in an expression"] = None
        else:
            self.exposed.add(name)

    def column(self, body: Node) -> str | None:
        """Notes how a column is written and says its name; None for `*`."""
        fields = body["fields"]
        last = fields[-1]
        if "A_Star" in last:
            return None
        name: str = last["String"]["sval"]
        if len(fields) == 1:
            self.bare.add(name)
        else:
            self.dotted.add((fields[-2]["String"]["sval"], name))
        return name

    def visit_call(self, body: Node, env: Names) -> None:
        parts = _strings(body["funcname"])
        args = body.get("args", ())
        if not self._stands_for_another_kind(parts, args):
            self.functions.add(_spelled(parts))
        for key in ("args", "agg_order", "agg_filter", "over"):
            if key in body:
                self.visit(body[key], env)

    def _stands_for_another_kind(self, parts: list[str], args: list[Node]) -> bool:
        """Calls that do what a statement of its own does, when their first argument is a constant."""
        if len(parts) == 2 and parts[0] != "pg_catalog":
            return False
        name = parts[-1]
        if name not in ("nextval", "setval", "set_config") or not args:
            return False
        constant = _constant(args[0])
        if constant is None:
            return False
        if name == "set_config":
            value = _constant(args[1]) if len(args) > 1 else None
            parameter = constant.lower()
            if value is None or parameter in ("client_encoding", "standard_conforming_strings"):
                return False
            self.also.append(StatementFacts("set", parameter=parameter, value=value))
            return True
        sequence = _sequence(constant)
        if sequence is None:
            return False
        self.also.append(StatementFacts(name, writes=frozenset({sequence})))
        return True

    def visit_indirection(self, body: Node, env: Names) -> None:
        """`(value).name`: a field, or a function of the value."""
        self.visit(body["arg"], env)
        for step in body["indirection"]:
            if "String" in step:
                name = step["String"]["sval"]
                self.exposed.add(name)
                if name not in builtins.RESULT_COLUMNS:
                    self.functions.add(_quoted(name))
            elif "A_Star" not in step:
                self.visit(step, env)

    def visit_operator(self, body: Node, env: Names) -> None:
        if body["kind"] in _OPERATOR_KINDS:
            self.operator(body["name"])
        for key in ("lexpr", "rexpr"):
            if key in body:
                self.visit(body[key], env)

    def operator(self, name: list[Node]) -> None:
        parts = _strings(name)
        if parts[-1] not in builtins.OPERATORS or (len(parts) > 1 and parts[0] != "pg_catalog"):
            self.functions.add(".".join(parts))

    def visit_sublink(self, body: Node, env: Names) -> None:
        if "testexpr" in body:
            self.visit(body["testexpr"], env)
        if "operName" in body:
            self.operator(body["operName"])
        role = Role.EXISTS if body["subLinkType"] == "EXISTS_SUBLINK" else Role.VALUE
        self.query(body["subselect"], env, role)

    def visit_cast(self, body: Node, env: Names) -> None:
        self.visit(body["arg"], env)
        self.visit(body["typeName"].get("typmods", ()), env)

    def visit_sort(self, body: Node, env: Names) -> None:
        if "useOp" in body:
            self.operator(body["useOp"])
        self.visit(body["node"], env)

    def visit_index_element(self, body: Node, env: Names) -> None:
        if "name" in body:
            self.exposed.add(body["name"])
        if "expr" in body:
            self.visit(body["expr"], env)

    def visit_target(self, body: Node, env: Names) -> None:
        """An assignment: its name is a column that is written, not read."""
        for key in ("indirection", "val"):
            if key in body:
                self.visit(body[key], env)

    def visit_query(self, body: Node, env: Names) -> None:
        self.select(body, env, Role.VALUE)

    # queries

    def query(self, node: Node, env: Names, role: Role) -> None:
        """A SELECT, or one of the statements that WITH may hold; those are kinds of their own."""
        ((tag, body),) = node.items()
        if tag == "SelectStmt":
            self.select(body, env, role)
            return
        kind = _CHANGES.get(tag)
        if kind is None:
            raise Unclassified(f"the grammar's node `{tag}` is not known as a query")
        inside = self.change(tag, body, env, role)
        self.also.append(StatementFacts(kind, writes=frozenset({inside}), unguarded=_is_unguarded(tag, body)))

    def select(self, body: Node, env: Names, role: Role) -> None:
        if "withClause" in body:
            env = self.ctes(body["withClause"], env)
        if "intoClause" in body:
            self.writes.add(_relation(body["intoClause"]["rel"]))
            role = Role.VALUE
        targets = body.get("targetList", [])
        if "larg" in body:
            self.select(body["larg"], env, Role.VALUE)
            self.select(body["rarg"], env, Role.VALUE)
        else:
            for item in body.get("fromClause", ()):
                self.source(item, env)
            self.targets(targets, env, role)
            for key in ("whereClause", "havingClause", "valuesLists", "windowClause"):
                if key in body:
                    self.visit(body[key], env)
            if "groupClause" in body:
                self.keys(body["groupClause"], targets, env)
            if "distinctClause" in body:
                if body["distinctClause"] == [{}]:
                    self.compared(targets)
                else:
                    self.keys(body["distinctClause"], targets, env)
        if "sortClause" in body:
            self.keys(body["sortClause"], targets, env)
        for key in ("limitOffset", "limitCount"):
            if key in body:
                self.visit(body[key], env)
        if "lockingClause" in body:
            self.locks = True

    def targets(self, targets: list[Node], env: Names, role: Role) -> None:
        for target in targets:
            entry = target["ResTarget"]
            value = entry["val"]
            if "ColumnRef" not in value:
                self.visit(value, env)
                continue
            name = self.column(value["ColumnRef"])
            if name is None:
                if role is Role.VALUE:
                    self.opaque["`*` where its values go on unseen"] = None
            elif role is Role.VALUE or role is Role.EXISTS:
                self.exposed.add(name)
            else:
                if role is Role.OUTER:
                    self.output.add(name)
                alias = entry.get("name")
                if alias is not None and alias != name:
                    self.aliases.setdefault(alias, set()).add(name)

    def compared(self, targets: list[Node]) -> None:
        """DISTINCT: every output column is compared with itself."""
        for position in range(1, len(targets) + 1):
            self.ordinal(position, targets)

    def keys(self, items: Iterable[Node], targets: list[Node], env: Names) -> None:
        """What is grouped or ordered by: an expression, an alias, or the ordinal of an output column."""
        for item in items:
            if "SortBy" in item:
                sort = item["SortBy"]
                if "useOp" in sort:
                    self.operator(sort["useOp"])
                self.keys((sort["node"],), targets, env)
            elif "GroupingSet" in item:
                self.keys(item["GroupingSet"].get("content", ()), targets, env)
            elif "A_Const" in item:
                position = item["A_Const"].get("ival", {}).get("ival", 0)
                self.ordinal(position, targets)
            else:
                self.visit(item, env)

    def ordinal(self, position: int, targets: list[Node]) -> None:
        for index, target in enumerate(targets[:position], start=1):
            value = target["ResTarget"]["val"]
            if "ColumnRef" in value:
                last = value["ColumnRef"]["fields"][-1]
                if "A_Star" in last:
                    self.opaque["`*` with DISTINCT, or before the column that an ordinal means,"] = None
                    return
                if index == position:
                    self.exposed.add(last["String"]["sval"])

    def ctes(self, clause: Node, env: Names) -> Names:
        """The WITH queries; returns the names that the statement behind them sees."""
        made = [cte["CommonTableExpr"] for cte in clause["ctes"]]
        seen = env | {cte["ctename"] for cte in made} if clause.get("recursive") else env
        for cte in made:
            if "aliascolnames" in cte:
                self.opaque["column names given by WITH"] = None
            for key, columns in (("search_clause", "search_col_list"), ("cycle_clause", "cycle_col_list")):
                if key in cte:
                    self.exposed.update(_strings(cte[key].get(columns, ())))
                    self.visit([value for value in cte[key].values() if isinstance(value, dict)], env)
            self.query(cte["ctequery"], seen, Role.SOURCE)
            seen = seen | {cte["ctename"]}
        return seen

    def source(self, node: Node, env: Names) -> None:
        """What stands in FROM, USING and their like."""
        ((tag, body),) = node.items()
        match tag:
            case "RangeVar":
                self.table(body, env)
            case "RangeSubselect":
                self.query(body["subquery"], env, Role.SOURCE)
                self.named(body.get("alias"))
            case "JoinExpr":
                self.source(body["larg"], env)
                self.source(body["rarg"], env)
                if body.get("isNatural"):
                    self.opaque["NATURAL JOIN"] = None
                self.exposed.update(_strings(body.get("usingClause", ())))
                self.named(body.get("join_using_alias"))
                self.named(body.get("alias"))
                if "quals" in body:
                    self.visit(body["quals"], env)
            case "RangeFunction":
                self.table_function(body, env)
            case "RangeTableSample":
                self.source(body["relation"], env)
                self.functions.add(_spelled(_strings(body["method"])))
                for key in ("args", "repeatable"):
                    if key in body:
                        self.visit(body[key], env)
            case "RangeTableFunc" | "JsonTable":
                self.visit([value for key, value in body.items() if key != "alias"], env)
                self.named(body.get("alias"))
            case _:
                raise Unclassified(f"the grammar's node `{tag}` is not known in FROM")

    def table(self, body: Node, env: Names) -> None:
        if "schemaname" in body or body["relname"] not in env:
            self.reads.add(_relation(body))
        if "alias" in body:
            self.named(body["alias"])
        else:
            self.rows.add(body["relname"])

    def named(self, alias: Node | None) -> None:
        if alias is not None:
            self.rows.add(alias["aliasname"])
            if "colnames" in alias:
                self.opaque[f"columns renamed by position (`{alias['aliasname']}(…)`)"] = None

    def table_function(self, body: Node, env: Names) -> None:
        columns = {"ordinality"} | {entry["ColumnDef"]["colname"] for entry in body.get("coldeflist", ())}
        names: list[str] = []
        for entry in body["functions"]:
            call, definitions = entry["List"]["items"]
            self.visit(call, env)
            if "FuncCall" in call:
                names.append(_strings(call["FuncCall"]["funcname"])[-1])
            columns |= {each["ColumnDef"]["colname"] for each in definitions.get("List", {}).get("items", ())}
        alias = body.get("alias", {})
        columns.update(_strings(alias.get("colnames", ())))
        for name in (alias["aliasname"],) if alias else names:
            self.scalars.setdefault(name, set()).update(columns | {name})

    # changes

    def change(self, tag: str, body: Node, env: Names, role: Role) -> Relation:
        """INSERT, UPDATE, DELETE or MERGE, at the top or inside WITH; returns what is changed."""
        if "withClause" in body:
            env = self.ctes(body["withClause"], env)
        target = _relation(body["relation"])
        self.rows.add(body["relation"].get("alias", {}).get("aliasname") or target.name)
        for item in (*body.get("fromClause", ()), *body.get("usingClause", ())):
            self.source(item, env)
        if "sourceRelation" in body:
            self.source(body["sourceRelation"], env)
        for key in ("cols", "targetList", "whereClause", "joinCondition", "mergeWhenClauses"):
            if key in body:
                self.visit(body[key], env)
        if "selectStmt" in body:
            self.query(body["selectStmt"], env, Role.VALUE)
        if "onConflictClause" in body:
            self.rows.add("excluded")
            self.visit(body["onConflictClause"], env)
        if "returningClause" in body:
            self.reads.add(target)
            self.returning(body["returningClause"], env, role)
        return target

    def returning(self, clause: Node, env: Names, role: Role) -> None:
        before_and_after = {"old", "new"}
        for option in clause.get("options", ()):
            before_and_after.add(option["ReturningOption"]["value"])
        self.rows |= before_and_after
        for target in clause["exprs"]:
            fields = target["ResTarget"]["val"].get("ColumnRef", {}).get("fields", ())
            # `old` and `new` are new in PostgreSQL 18: what RowDescription says of them was not shown.
            seen = len(fields) > 1 and fields[0].get("String", {}).get("sval") in before_and_after
            self.targets([target], env, Role.VALUE if seen else role)


def _strings(nodes: Iterable[Node]) -> list[str]:
    return [node["String"]["sval"] for node in nodes]


def _quoted(part: str) -> str:
    return f'"{part}"' if "." in part else part


def _spelled(parts: list[str]) -> str:
    """A function as `StatementFacts` names it: a part that holds a dot is quoted, so that it cannot pass for two."""
    return ".".join(map(_quoted, parts[-2:]))


def _relation(body: Node) -> Relation:
    schema = body.get("schemaname", "")
    if not schema and body.get("relpersistence") == "t":
        schema = "pg_temp"
    return Relation(schema, body["relname"])


def _constant(node: Node) -> str | None:
    """The value of a plain string constant, through casts."""
    while "TypeCast" in node:
        node = node["TypeCast"]["arg"]
    value = node.get("A_Const", {}).get("sval")
    return None if value is None else value.get("sval", "")


def _sequence(text: str) -> Relation | None:
    """A sequence as `nextval` takes it: folded and perhaps quoted, as in SQL. None when it is anything unusual."""
    parts = text.split(".")
    if len(parts) > 2 or not all(parts):
        return None
    names: list[str] = []
    for part in parts:
        inner = part[1:-1] if len(part) > 2 and part[0] == part[-1] == '"' else part.lower()
        if not inner.replace("_", "a").replace("$", "a").isalnum() or not inner.isascii():
            return None
        names.append(inner)
    return Relation(names[0], names[1]) if len(names) == 2 else Relation("", names[0])


def _is_unguarded(tag: str, body: Node) -> bool:
    return tag in ("UpdateStmt", "DeleteStmt") and "whereClause" not in body


_CHANGES = {"InsertStmt": "insert", "UpdateStmt": "update", "DeleteStmt": "delete", "MergeStmt": "merge"}

_OPERATOR_KINDS = frozenset(
    {
        *{"AEXPR_OP", "AEXPR_OP_ANY", "AEXPR_OP_ALL", "AEXPR_DISTINCT", "AEXPR_NOT_DISTINCT", "AEXPR_NULLIF"},
        *{"AEXPR_IN", "AEXPR_LIKE", "AEXPR_ILIKE", "AEXPR_SIMILAR"},
    }
)


def _change_inside(tag: str) -> Callable[[_Walk, Node, Names], None]:
    return lambda walk, body, env: walk.query({tag: body}, env, Role.VALUE)


_EXPRESSIONS: dict[str, Callable[[_Walk, Node, Names], None]] = {
    "ColumnRef": _Walk.visit_column,
    "FuncCall": _Walk.visit_call,
    "A_Expr": _Walk.visit_operator,
    "A_Indirection": _Walk.visit_indirection,
    "SubLink": _Walk.visit_sublink,
    "TypeCast": _Walk.visit_cast,
    "SortBy": _Walk.visit_sort,
    "IndexElem": _Walk.visit_index_element,
    "ResTarget": _Walk.visit_target,
    "SelectStmt": _Walk.visit_query,
    **{tag: _change_inside(tag) for tag in _CHANGES},
}

_LEAVES = frozenset(
    {
        *{"A_Const", "ParamRef", "SetToDefault", "SQLValueFunction", "CurrentOfExpr", "MergeSupportFunc", "A_Star"},
        *{"String", "Integer", "Float", "Boolean", "BitString", "TypeName", "RoleSpec", "AccessPriv"},
        *{"ObjectWithArgs", "TriggerTransition", "JsonFormat", "JsonReturning"},
    }
)
"""Nodes that hold nothing to look at."""

_WALKED = frozenset(
    {
        *{"BoolExpr", "NullTest", "BooleanTest", "CaseExpr", "CaseWhen", "CoalesceExpr", "MinMaxExpr", "RowExpr"},
        *{"A_ArrayExpr", "A_Indices", "GroupingFunc", "GroupingSet", "CollateClause", "NamedArgExpr", "List"},
        *{"MultiAssignRef", "WindowDef", "XmlExpr", "XmlSerialize", "RangeTableFuncCol", "MergeWhenClause"},
        *{"JsonObjectConstructor", "JsonArrayConstructor", "JsonArrayQueryConstructor", "JsonObjectAgg"},
        *{"JsonArrayAgg", "JsonKeyValue", "JsonValueExpr", "JsonIsPredicate", "JsonParseExpr", "JsonScalarExpr"},
        *{"JsonSerializeExpr", "JsonFuncExpr", "JsonArgument", "JsonTableColumn", "JsonTablePathSpec"},
        *{"JsonBehavior", "JsonOutput", "RangeVar", "DefElem", "ColumnDef", "Constraint", "AlterTableCmd"},
        *{"ATAlterConstraint", "ReplicaIdentityStmt", "PartitionCmd", "PartitionElem", "PartitionSpec"},
        *{"PartitionBoundSpec", "PartitionRangeDatum", "TableLikeClause", "FunctionParameter", "StatsElem"},
        *{"VacuumRelation", "PublicationObjSpec", "PublicationTable", "CreateOpClassItem", "ReturnStmt"},
    }
)
"""Nodes that only hold others. A relation below one of them is the object of a definition."""


# --- statements -------------------------------------------------------------------------------------------------------

_Handler = Callable[[str, Node], StatementFacts]


def _select(tag: str, body: Node) -> StatementFacts:
    walk = _Walk()
    walk.select(body, _NOTHING, Role.OUTER)
    return walk.facts("select-into" if walk.writes else "select")


def _change(tag: str, body: Node) -> StatementFacts:
    walk = _Walk()
    walk.writes.add(walk.change(tag, body, _NOTHING, Role.OUTER))
    return walk.facts(_CHANGES[tag], unguarded=_is_unguarded(tag, body))


def _create_table_as(tag: str, body: Node) -> StatementFacts:
    if "ExecuteStmt" in body["query"]:
        raise Unclassified("CREATE TABLE AS EXECUTE moves rows of a statement that is not seen")
    walk = _Walk()
    walk.writes.add(_relation(body["into"]["rel"]))
    walk.query(body["query"], _NOTHING, Role.VALUE)
    return walk.facts("create-materialized-view" if body["objtype"] == "OBJECT_MATVIEW" else "create-table-as")


def _create_view(tag: str, body: Node) -> StatementFacts:
    walk = _Walk()
    walk.writes.add(_relation(body["view"]))
    walk.query(body["query"], _NOTHING, Role.VALUE)
    return walk.facts("create-view")


def _copy(tag: str, body: Node) -> StatementFacts:
    walk = _Walk()
    incoming = body.get("is_from", False)
    if "relation" in body:
        (walk.writes if incoming else walk.reads).add(_relation(body["relation"]))
        if not incoming:
            if "attlist" in body:
                walk.exposed.update(_strings(body["attlist"]))
            else:
                walk.opaque["COPY of all columns"] = None
    if "query" in body:
        walk.query(body["query"], _NOTHING, Role.VALUE)
    if "whereClause" in body:
        walk.visit(body["whereClause"], _NOTHING)
    if body.get("is_program"):
        return walk.facts("copy-program")
    if "filename" in body:
        return walk.facts("copy-file")
    return walk.facts("copy-in" if incoming else "copy-out")


def _declare(tag: str, body: Node) -> StatementFacts:
    """A cursor is its query, run later."""
    walk = _Walk()
    walk.query(body["query"], _NOTHING, Role.OUTER)
    if body.get("options", 0) & BINARY_CURSOR:
        walk.opaque["a BINARY cursor"] = None
    return walk.facts("select")


def _explain(tag: str, body: Node) -> StatementFacts:
    inner = _statement(body["query"])
    if inner.kind == "execute" or any(map(_runs, body.get("options", ()))):
        return inner
    return StatementFacts(
        "select",
        reads=frozenset().union(*(part.relations for part in inner.parts)),
        functions=inner.functions,
        exposed_columns=inner.exposed_columns | inner.output_columns,
        opaque=inner.opaque,
    )


def _runs(option: Node) -> bool:
    """Whether it is EXPLAIN's option ANALYZE, switched on."""
    element = option["DefElem"]
    if element["defname"].lower() != "analyze":
        return False
    argument = element.get("arg", {})
    word = argument.get("String", {}).get("sval", "").lower()
    return not (word in ("false", "off") or argument.get("Integer") in ({}, {"ival": 0}))


def _prepare(tag: str, body: Node) -> StatementFacts:
    return StatementFacts("prepare", also=(_statement(body["query"]),))


def _execute(tag: str, body: Node) -> StatementFacts:
    walk = _Walk()
    walk.visit(body.get("params", ()), _NOTHING)
    return walk.facts("execute")


def _call(tag: str, body: Node) -> StatementFacts:
    walk = _Walk()
    walk.visit_call(body["funccall"], _NOTHING)
    return walk.facts("call")


def _set(tag: str, body: Node) -> StatementFacts:
    if body["kind"] == "VAR_RESET_ALL":
        return StatementFacts("reset", parameter="all")
    parameter = body["name"].lower()
    if body["kind"] in ("VAR_RESET", "VAR_SET_DEFAULT"):
        return StatementFacts("reset", parameter=parameter)
    values = [_setting(argument) for argument in body.get("args", ())] if body["kind"] == "VAR_SET_VALUE" else []
    return StatementFacts("set", parameter=parameter, value=", ".join(values))


def _setting(argument: Node) -> str:
    constant = argument.get("A_Const", {})
    for key in ("sval", "ival", "fval"):
        if key in constant:
            return str(constant[key].get(key, "" if key == "sval" else 0))
    return "…"


def _show(tag: str, body: Node) -> StatementFacts:
    return StatementFacts("show", parameter=body["name"].lower())


_TRANSACTIONS = {
    "TRANS_STMT_BEGIN": "begin",
    "TRANS_STMT_START": "begin",
    "TRANS_STMT_COMMIT": "commit",
    "TRANS_STMT_ROLLBACK": "rollback",
    "TRANS_STMT_SAVEPOINT": "savepoint",
    "TRANS_STMT_RELEASE": "release",
    "TRANS_STMT_ROLLBACK_TO": "rollback-to",
    "TRANS_STMT_PREPARE": "prepare-transaction",
    "TRANS_STMT_COMMIT_PREPARED": "commit-prepared",
    "TRANS_STMT_ROLLBACK_PREPARED": "rollback-prepared",
}


def _transaction(tag: str, body: Node) -> StatementFacts:
    return StatementFacts(_TRANSACTIONS[body["kind"]])


def _fetch(tag: str, body: Node) -> StatementFacts:
    return StatementFacts("move" if body.get("ismove") else "fetch")


def _vacuum(tag: str, body: Node) -> StatementFacts:
    return _define(tag, body, "vacuum" if body.get("is_vacuumcmd") else "analyze")


def _grant(tag: str, body: Node) -> StatementFacts:
    noun = "-role" if tag == "GrantRoleStmt" else ""
    return _define(tag, body, f"{'grant' if body.get('is_grant') else 'revoke'}{noun}")


_NOUNS = {
    "OBJECT_ACCESS_METHOD": "access-method",
    "OBJECT_AGGREGATE": "aggregate",
    "OBJECT_ATTRIBUTE": "type",
    "OBJECT_CAST": "cast",
    "OBJECT_COLLATION": "collation",
    "OBJECT_COLUMN": "table",
    "OBJECT_CONVERSION": "conversion",
    "OBJECT_DATABASE": "database",
    "OBJECT_DOMAIN": "domain",
    "OBJECT_DOMCONSTRAINT": "domain",
    "OBJECT_EVENT_TRIGGER": "event-trigger",
    "OBJECT_EXTENSION": "extension",
    "OBJECT_FDW": "foreign-data-wrapper",
    "OBJECT_FOREIGN_SERVER": "server",
    "OBJECT_FOREIGN_TABLE": "foreign-table",
    "OBJECT_FUNCTION": "function",
    "OBJECT_INDEX": "index",
    "OBJECT_LANGUAGE": "language",
    "OBJECT_LARGEOBJECT": "large-object",
    "OBJECT_MATVIEW": "materialized-view",
    "OBJECT_OPCLASS": "operator-class",
    "OBJECT_OPERATOR": "operator",
    "OBJECT_OPFAMILY": "operator-family",
    "OBJECT_POLICY": "policy",
    "OBJECT_PROCEDURE": "procedure",
    "OBJECT_PUBLICATION": "publication",
    "OBJECT_ROLE": "role",
    "OBJECT_ROUTINE": "function",
    "OBJECT_RULE": "rule",
    "OBJECT_SCHEMA": "schema",
    "OBJECT_SEQUENCE": "sequence",
    "OBJECT_STATISTIC_EXT": "statistics",
    "OBJECT_SUBSCRIPTION": "subscription",
    "OBJECT_TABCONSTRAINT": "table",
    "OBJECT_TABLE": "table",
    "OBJECT_TABLESPACE": "tablespace",
    "OBJECT_TRANSFORM": "transform",
    "OBJECT_TRIGGER": "trigger",
    "OBJECT_TSCONFIGURATION": "text-search",
    "OBJECT_TSDICTIONARY": "text-search",
    "OBJECT_TSPARSER": "text-search",
    "OBJECT_TSTEMPLATE": "text-search",
    "OBJECT_TYPE": "type",
    "OBJECT_USER_MAPPING": "user-mapping",
    "OBJECT_VIEW": "view",
}

_RELATION_OBJECTS = frozenset({"table", "view", "materialized-view", "index", "sequence", "foreign-table"})
_PARTS_OF_RELATIONS = frozenset(
    {"OBJECT_COLUMN", "OBJECT_TABCONSTRAINT", "OBJECT_TRIGGER", "OBJECT_RULE", "OBJECT_POLICY"}
)


def _noun(object_type: str) -> str:
    try:
        return _NOUNS[object_type]
    except KeyError:
        raise Unclassified(f"objects of the kind `{object_type}` are not known") from None


def _define(tag: str, body: Node, kind: str) -> StatementFacts:
    """A statement about objects: every relation in it that no query of its own reads is its object."""
    walk = _Walk()
    for key, value in body.items():
        if key == "funcname" and tag != "CreateTrigStmt":
            continue
        if key == "funcname":
            walk.functions.add(_spelled(_strings(value)))
        elif key == "schemaElts":
            walk.also += map(_statement, value)
        elif type(value) is dict or type(value) is list:
            walk.visit(value, _NOTHING)
    return walk.facts(kind)


def _fixed(kind: str) -> _Handler:
    return lambda tag, body: StatementFacts(kind)


def _defining(kind: str) -> _Handler:
    return lambda tag, body: _define(tag, body, kind)


def _of_object(verb: str, key: str) -> _Handler:
    """The kind follows from the type of object, which stands under `key`."""

    def handle(tag: str, body: Node) -> StatementFacts:
        object_type = body[key]
        if object_type == "OBJECT_COLUMN" and body.get("relationType", "") in _NOUNS:
            object_type = body["relationType"]
        return _define(tag, body, f"{verb}-{_noun(object_type)}")

    return handle


def _object_names(object_type: str, node: Node) -> Iterable[Relation]:
    """The relation that an object's dotted name names or starts with."""
    parts = _strings(node["List"]["items"]) if "List" in node else []
    if object_type in _PARTS_OF_RELATIONS:
        parts = parts[:-1]
    elif _noun(object_type) not in _RELATION_OBJECTS:
        return
    if parts:
        yield Relation(parts[-2] if len(parts) > 1 else "", parts[-1])


def _drop(tag: str, body: Node) -> StatementFacts:
    object_type = body["removeType"]
    relations = [name for node in body["objects"] for name in _object_names(object_type, node)]
    return StatementFacts(f"drop-{_noun(object_type)}", writes=frozenset(relations))


def _describe(kind: str) -> _Handler:
    def handle(tag: str, body: Node) -> StatementFacts:
        return StatementFacts(kind, writes=frozenset(_object_names(body["objtype"], body["object"])))

    return handle


_STATEMENTS: dict[str, _Handler] = {
    "SelectStmt": _select,
    **dict.fromkeys(_CHANGES, _change),
    "CreateTableAsStmt": _create_table_as,
    "ViewStmt": _create_view,
    "CopyStmt": _copy,
    "DeclareCursorStmt": _declare,
    "ExplainStmt": _explain,
    "PrepareStmt": _prepare,
    "ExecuteStmt": _execute,
    "CallStmt": _call,
    "VariableSetStmt": _set,
    "VariableShowStmt": _show,
    "TransactionStmt": _transaction,
    "FetchStmt": _fetch,
    "VacuumStmt": _vacuum,
    "GrantStmt": _grant,
    "GrantRoleStmt": _grant,
    "DropStmt": _drop,
    "CommentStmt": _describe("comment"),
    "SecLabelStmt": _describe("security-label"),
    "DoStmt": _fixed("do"),
    "ClosePortalStmt": _fixed("close"),
    "DeallocateStmt": _fixed("deallocate"),
    "DiscardStmt": _fixed("discard"),
    "ConstraintsSetStmt": _fixed("set-constraints"),
    "ListenStmt": _fixed("listen"),
    "UnlistenStmt": _fixed("unlisten"),
    "NotifyStmt": _fixed("notify"),
    "LoadStmt": _fixed("load"),
    "CheckPointStmt": _fixed("checkpoint"),
    "LockStmt": _defining("lock-table"),
    "TruncateStmt": _defining("truncate"),
    "ClusterStmt": _defining("cluster"),
    "ReindexStmt": _defining("reindex"),
    "RefreshMatViewStmt": _defining("refresh-materialized-view"),
    "AlterSystemStmt": _fixed("alter-system"),
    "ReassignOwnedStmt": _fixed("reassign-owned"),
    "DropOwnedStmt": _fixed("drop-owned"),
    "ImportForeignSchemaStmt": _fixed("import-foreign-schema"),
    "AlterDefaultPrivilegesStmt": _fixed("alter-default-privileges"),
    "AlterTableStmt": _of_object("alter", "objtype"),
    "AlterTableMoveAllStmt": _of_object("alter", "objtype"),
    "AlterObjectDependsStmt": _of_object("alter", "objectType"),
    "AlterObjectSchemaStmt": _of_object("alter", "objectType"),
    "AlterOwnerStmt": _of_object("alter", "objectType"),
    "RenameStmt": _of_object("alter", "renameType"),
    "DefineStmt": _of_object("create", "kind"),
    "CreateStmt": _defining("create-table"),
    "CreateForeignTableStmt": _defining("create-foreign-table"),
    "IndexStmt": _defining("create-index"),
    "CreateStatsStmt": _defining("create-statistics"),
    "AlterStatsStmt": _defining("alter-statistics"),
    "CreateSeqStmt": _defining("create-sequence"),
    "AlterSeqStmt": _defining("alter-sequence"),
    "CreateTrigStmt": _defining("create-trigger"),
    "CreateEventTrigStmt": _defining("create-event-trigger"),
    "AlterEventTrigStmt": _defining("alter-event-trigger"),
    "RuleStmt": _defining("create-rule"),
    "CreatePolicyStmt": _defining("create-policy"),
    "AlterPolicyStmt": _defining("alter-policy"),
    "CreateFunctionStmt": lambda tag, body: _define(
        tag, body, "create-procedure" if body.get("is_procedure") else "create-function"
    ),
    "AlterFunctionStmt": _of_object("alter", "objtype"),
    "CreateSchemaStmt": _defining("create-schema"),
    "CreateExtensionStmt": _defining("create-extension"),
    "AlterExtensionStmt": _defining("alter-extension"),
    "AlterExtensionContentsStmt": _defining("alter-extension"),
    "CreateFdwStmt": _defining("create-foreign-data-wrapper"),
    "AlterFdwStmt": _defining("alter-foreign-data-wrapper"),
    "CreateForeignServerStmt": _defining("create-server"),
    "AlterForeignServerStmt": _defining("alter-server"),
    "CreateUserMappingStmt": _defining("create-user-mapping"),
    "AlterUserMappingStmt": _defining("alter-user-mapping"),
    "DropUserMappingStmt": _defining("drop-user-mapping"),
    "CreateRoleStmt": _defining("create-role"),
    "AlterRoleStmt": _defining("alter-role"),
    "AlterRoleSetStmt": _fixed("alter-role"),
    "DropRoleStmt": _defining("drop-role"),
    "CreatedbStmt": _defining("create-database"),
    "AlterDatabaseStmt": _defining("alter-database"),
    "AlterDatabaseSetStmt": _fixed("alter-database"),
    "AlterDatabaseRefreshCollStmt": _defining("alter-database"),
    "DropdbStmt": _defining("drop-database"),
    "CreateTableSpaceStmt": _defining("create-tablespace"),
    "AlterTableSpaceOptionsStmt": _defining("alter-tablespace"),
    "DropTableSpaceStmt": _defining("drop-tablespace"),
    "CreatePublicationStmt": _defining("create-publication"),
    "AlterPublicationStmt": _defining("alter-publication"),
    "CreateSubscriptionStmt": _defining("create-subscription"),
    "AlterSubscriptionStmt": _defining("alter-subscription"),
    "DropSubscriptionStmt": _defining("drop-subscription"),
    "CreateAmStmt": _defining("create-access-method"),
    "CreateCastStmt": _defining("create-cast"),
    "CreateConversionStmt": _defining("create-conversion"),
    "CreateDomainStmt": _defining("create-domain"),
    "AlterDomainStmt": _defining("alter-domain"),
    "CreateEnumStmt": _defining("create-type"),
    "AlterEnumStmt": _defining("alter-type"),
    "CompositeTypeStmt": _defining("create-type"),
    "CreateRangeStmt": _defining("create-type"),
    "AlterTypeStmt": _defining("alter-type"),
    "AlterCollationStmt": _defining("alter-collation"),
    "CreateOpClassStmt": _defining("create-operator-class"),
    "CreateOpFamilyStmt": _defining("create-operator-family"),
    "AlterOpFamilyStmt": _defining("alter-operator-family"),
    "AlterOperatorStmt": _defining("alter-operator"),
    "CreatePLangStmt": _defining("create-language"),
    "CreateTransformStmt": _defining("create-transform"),
    "AlterTSConfigurationStmt": _defining("alter-text-search"),
    "AlterTSDictionaryStmt": _defining("alter-text-search"),
}
