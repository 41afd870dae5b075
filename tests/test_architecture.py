"""What the code must look like: checked on the syntax trees of all files, function bodies included."""

import ast
import collections
import dataclasses
import importlib
import io
import re
import tokenize
import typing
from pathlib import Path

import pytest

from srlm_jax.pipeline.settings import Settings

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "srlm_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
OURS = sorted([*FILES, *(ROOT / "configs").glob("*.py"), *(ROOT / "tests").rglob("*.py"), ROOT / "setup.py"])
TREES = {path: ast.parse(path.read_text()) for path in FILES}

# A file imports from its own layer and from those before it, never from one after.
LAYERS = (
    "errors",
    "limits",
    "records",
    "parallel",
    "commandline",
    "storage",
    "text",
    "model",
    "sampling",
    "judge",
    "data",
    "train",
    "evaluate",
    "pipeline",
    "convert",
    "generate",
    "judging_examples",
    "bench",
    "plan",
    "main",
)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name.split(".")[0] == "srlm_jax"}


def layer(module: str) -> str | None:
    """The part of the package that a module belongs to, None for the package itself."""
    return module.split(".")[1] if "." in module else None


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


# --- imports ----------------------------------------------------------------------------------------------------------


def test_every_part_has_a_layer():
    assert {layer(module) for module in MODULES} - {None} == set(LAYERS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_file_imports_from_a_later_layer(module):
    allowed = LAYERS[: LAYERS.index(layer(module)) + 1] if layer(module) else ()
    wrong = {name for name in imports(MODULES[module]) if layer(name) is not None and layer(name) not in allowed}
    assert not wrong


def test_no_two_files_need_one_another():
    needs = {module: imports(path) & MODULES.keys() - {module} for module, path in MODULES.items()}
    while free := {module for module, needed in needs.items() if not needed}:
        needs = {module: needed - free for module, needed in needs.items() if module not in free}
    assert not needs, "these files import one another in a circle, or what does"


def test_no_file_is_named_after_nothing():
    assert not [path for path in OURS if re.search(r"util|common|helper|misc", path.stem)]


def test_packages_are_folders_and_no_more():
    assert [path for path in FILES if path.name == "__init__.py" and path.stat().st_size] == [PACKAGE / "__init__.py"]


# --- configuration ----------------------------------------------------------------------------------------------------


def settings_classes() -> dict[type, set[str]]:
    """Every dataclass that the settings reach, with its fields."""
    found, waiting = {}, [Settings]
    while waiting:
        kinds = typing.get_type_hints(cls := waiting.pop())
        found[cls] = set(kinds)
        waiting += [kind for kind in map(given, kinds.values()) if dataclasses.is_dataclass(kind)]
    return found


def given(kind: type) -> type:
    """Of `X | None` X, of any other type itself."""
    options = typing.get_args(kind)
    return next(option for option in options if option is not type(None)) if type(None) in options else kind


def full_names(fields, path: str) -> set[str]:
    """Of a class of settings or of a config's tree: every field that holds a value, by its full name."""
    found = set()
    for name, inside in (typing.get_type_hints(fields) if isinstance(fields, type) else fields).items():
        inside = given(inside)
        nested = dataclasses.is_dataclass(inside) or isinstance(inside, dict)
        found |= full_names(inside, f"{path}.{name}") if nested else {f"{path}.{name}"}
    return found


class _Reads(ast.NodeVisitor):
    """Names read as an attribute, but not inside the classes of the settings themselves."""

    def __init__(self, own: set[str]):
        self.own, self.names = own, set()

    def visit_ClassDef(self, node):
        if node.name not in self.own:
            self.generic_visit(node)

    def visit_Attribute(self, node):
        if isinstance(node.ctx, ast.Load):
            self.names.add(node.attr)
        self.generic_visit(node)


def test_every_field_of_the_configuration_has_a_reader():
    classes = settings_classes()
    reads = _Reads({cls.__name__ for cls in classes})
    for tree in TREES.values():
        reads.visit(tree)
    assert {f"{cls.__name__}.{field}" for cls, fields in classes.items() for field in fields - reads.names} == set()


@pytest.mark.parametrize("scale", importlib.import_module("configs.base").SCALES)
def test_config_files_and_settings_have_the_same_fields(scale):
    tree = importlib.import_module("configs.base").get_config(scale, 3).to_dict()
    wanted, found = full_names(Settings, "config"), full_names(tree, "config")
    # A section that is absent stands for all of its fields.
    absent = {name for name in found - wanted if any(other.startswith(f"{name}.") for other in wanted)}
    assert found - absent == {name for name in wanted if not name.startswith(tuple(f"{part}." for part in absent))}


def test_only_configs_have_defaults():
    """A default far from the config hides a field that nobody passes on."""
    wrong = [
        f"{cls.__name__}.{field.name}"
        for cls in settings_classes()
        for field in dataclasses.fields(cls)
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    ]
    assert not wrong


# --- arrays -----------------------------------------------------------------------------------------------------------


def letters(name: str) -> list[str] | None:
    """The axes that a name's suffix gives: `q_BNTH` -> B N T H, `tokens_1T` -> 1 T; None where it has no suffix."""
    match = re.fullmatch(r"[a-z]\w*?_([A-Z1]+)", name)
    return None if match is None else list(match[1])


def axes(annotation: ast.expr) -> list[str] | None:
    """The axes of `Float[Array, "B T"]`, alone or in a union with None; None for any other annotation."""
    if isinstance(annotation, ast.BinOp):
        sides = [axes(side) for side in (annotation.left, annotation.right)]
        return next((side for side in sides if side is not None), None)
    if not (isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple)):
        return None
    kind, *rest = annotation.slice.elts
    if ast.unparse(kind) not in ("Array", "np.ndarray", "jax.Array") or len(rest) != 1:
        return None
    return [axis.removeprefix("#") for axis in ast.literal_eval(rest[0]).split()]  # "#B": of size 1 or B


def test_suffixes_say_the_shapes_that_annotations_check():
    wrong, compared = [], 0
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.arg):
                name = node.arg
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name = node.target.id
            else:
                continue
            if node.annotation is None or letters(name) is None or axes(node.annotation) is None:
                continue
            compared += 1
            checked = axes(node.annotation)
            # An axis of fixed size ("A 2") may be left out of the name.
            if letters(name) not in (checked, [axis for axis in checked if not axis.isdigit()]):
                wrong.append(f"{place(path, node)}: {name}: {checked}")
    assert not wrong
    assert compared > 30  # or the test reads nothing


# --- banned -----------------------------------------------------------------------------------------------------------


def dotted(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""


def uses(path: Path, *names: str) -> list[str]:
    """Where a file names one of these: `nnx.jit`, `from flax.nnx import jit`, `PartitionSpec`."""
    found = []
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Attribute | ast.Name):
            full = dotted(node)
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[-1]
            found += [place(path, node) for alias in node.names if {alias.name, f"{module}.{alias.name}"} & {*names}]
            continue
        else:
            continue
        if any(full == name or full.endswith(f".{name}") for name in names):
            found.append(place(path, node))
    return found


def test_partition_specs_are_made_in_one_place():
    users = {module_of(path) for path in FILES if uses(path, "PartitionSpec")}
    assert users == {"srlm_jax.parallel.rules"}


def test_transformations_are_those_of_jax():
    names = [f"nnx.{n}" for n in ("jit", "grad", "value_and_grad", "scan", "vmap", "Optimizer", "Dropout", "Cache")]
    assert not [where for path in FILES for where in uses(path, *names)]


def test_nothing_is_unpickled():
    banned = re.compile(r"^\s*(?:import|from)\s+(?:pickle|dill|cloudpickle|joblib)\b|allow_pickle", re.MULTILINE)
    assert not [path for path in FILES if banned.search(path.read_text())]


def test_no_complaint_is_silenced():
    banned = re.compile(r"#\s*(?:noqa|type:\s*ignore|pragma|pylint|pyright|pyrefly|mypy|ruff:)", re.IGNORECASE)
    wrong = []
    for path in OURS:
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type == tokenize.COMMENT and banned.match(token.string):
                wrong.append(f"{path.relative_to(ROOT)}:{token.start[0]}: {token.string}")
    assert not wrong


def test_training_never_asks_the_oracle():
    """It plays the humans when the world is made; after that the evaluation alone may see its scores."""
    names = ("oracle_score", "world.mark", "oracle_metrics", "_oracle_scores")
    allowed = {"srlm_jax.data.world", "srlm_jax.data.world_corpus", "srlm_jax.evaluate.oracle"}
    users = {module_of(path) for path in FILES if uses(path, *names)}
    assert users - allowed == {"srlm_jax.pipeline.evaluation"}


def test_files_fit_in_a_head():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 450} == {}


def test_classes_are_nouns_of_what_they_are():
    names = [node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert not [name for name in names if re.search(r"Manager|Handler|Helper|^Base|Util", name)]


def test_test_files_have_names_of_their_own():
    # pytest imports them by their base name.
    names = collections.Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    assert {name for name, count in names.items() if count > 1} == set()
