"""Whether what the pages say exists: links, paths, commands, configuration keys, modules and Python code.

python -m scripts.readme.page_checks  # exit 1 with a line per problem

Nothing is run: commands go through the parser of the command line, Python blocks are compiled and their imports from
structprune resolved. Every check takes text and gives problems, one line each.
"""

import ast
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from structprune.cli.main import app
from structprune.config import Config, Sections
from structprune.errors import UserError
from structprune.evaluation.settings import EvaluationConfig
from structprune.generation.settings import GenerateConfig

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?)\s*$", re.MULTILINE)
PATH = re.compile(r"(?:structprune|scripts|configs|tests|docs)/[\w./*{},-]*")
KEY = re.compile(r"([a-z]+)\.([a-z_]+)(?:=(\S+))?")
MODULE = re.compile(r"-m ((?:scripts|structprune)[\w.]*)")
OPTION = re.compile(r"(?<!\S)(--[a-z][\w-]*)")
CONFIGS: dict[str, type[Sections]] = {
    "prune": Config,
    "inspect": Config,
    "eval": EvaluationConfig,
    "generate": GenerateConfig,
}  # of the verbs that take --set
SECTIONS: dict[str, type[Sections]] = {
    name: model for model in (Config, EvaluationConfig, GenerateConfig) for name in model.model_fields
}
FILES = ("safetensors", "json", "yaml", "py", "txt", "md")  # calibration.safetensors is a file, not a key
VERBS = typer.main.get_group(app).commands


def pages() -> list[Path]:
    """README.md, the other pages of the root, and those of docs/."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def problems(path: Path) -> list[str]:
    """Everything that is wrong with a page."""
    text = path.read_text(encoding="utf-8")
    prose = BLOCK.sub("", text)
    shell = [block for language, block in BLOCK.findall(text) if language in ("bash", "console")]
    python = [block for language, block in BLOCK.findall(text) if language == "python"]
    wrong = [*link_problems(prose, path), *span_problems(prose)]
    wrong += [problem for block in shell for problem in command_problems(block)]
    wrong += [problem for block in python for problem in python_problems(block)]
    return wrong


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    seen: dict[str, int] = {}
    slugs = set()
    for heading in HEADING.findall(BLOCK.sub("", text)):
        plain = LINK.sub("", heading.replace("[", "")) if "](" in heading else heading
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        count = seen[slug] = seen.get(slug, -1) + 1
        slugs.add(slug if count == 0 else f"{slug}-{count}")
    return slugs


def link_problems(text: str, path: Path) -> list[str]:
    """Links of a page at `path` to files or anchors that are not there."""
    wrong, home = [], ROOT if path.is_relative_to(ROOT) else path.parent
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists():
            wrong.append(f"link to '{target}': no such file")
        elif not file.is_relative_to(home):
            wrong.append(f"link to '{target}' leaves the repository")
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            wrong.append(f"link to '{target}': no heading with that anchor")
    return wrong


def span_problems(text: str) -> list[str]:
    """Inline code that names a path, configuration key, verb, option or module that does not exist."""
    wrong = [f"inline code runs over the end of the line '{line}'" for line in text.splitlines() if line.count("`") % 2]
    for span in SPAN.findall(text):
        if PATH.fullmatch(span):
            wrong += [] if list(ROOT.glob(span.rstrip("/"))) else [f"path '{span}': no such file"]
        elif key := KEY.fullmatch(span):
            wrong += key_problems(*key.groups())
        elif span.startswith("structprune "):
            wrong += verb_problems(span.split())
        elif MODULE.search(span):
            wrong += module_problems(span)
    return wrong


def key_problems(section: str, key: str, value: str | None) -> list[str]:
    """A configuration key that there is not, or a value that it does not take."""
    if section not in SECTIONS or key in FILES:
        return []
    name = f"{section}.{key}"
    if name not in SECTIONS[section].known_keys():
        return [f"key '{name}': not a configuration key"]
    try:
        SECTIONS[section].load(overrides=[] if value is None else [f"{name}={value}"])
    except UserError as error:
        return [f"key '{name}={value}': {error}"]
    return []


def verb_problems(words: list[str]) -> list[str]:
    """A verb or an option, in a span such as `structprune eval --text FILE`, that there is not."""
    if words[1].startswith("-"):
        return []
    if words[1] not in VERBS:
        return [f"'{' '.join(words)}': no verb '{words[1]}'"]
    known = {option for parameter in VERBS[words[1]].params for option in parameter.opts}
    return [
        f"'{' '.join(words)}': no option '{word}'" for word in words if OPTION.fullmatch(word) and word not in known
    ]


def command_lines(block: str) -> Iterator[str]:
    """The commands of a shell block: continued lines joined, comments dropped, chains taken apart."""
    for line in block.replace("\\\n", " ").splitlines():
        for command in re.sub(r"(?:^|\s)#.*", "", line).split("&&"):
            if command.strip():
                yield command.strip()


def command_problems(block: str) -> list[str]:
    """Commands of a shell block that structprune's parser refuses, or modules that are not there."""
    wrong = []
    for command in command_lines(block):
        words = shlex.split(command)
        wrong += module_problems(command)
        if Path(words[0]).name == "structprune":
            wrong += parse_problems(words[1:])
        elif words[:2] in (["python", "-m"], ["accelerate", "launch"], ["torchrun", "-m"]) and "structprune" in words:
            wrong += parse_problems(words[words.index("structprune") + 1 :])
    return wrong


def parse_problems(words: list[str]) -> list[str]:
    """What the command line says of arguments: a verb, its options and their types, and every `--set`."""
    if not words or words[0].startswith("-"):
        return []
    command = f"structprune {' '.join(words)}"
    verb = VERBS.get(words[0])
    if verb is None:
        return [f"'{command}': no verb '{words[0]}'"]
    try:
        values = verb.make_context(words[0], words[1:]).params
        if words[0] in CONFIGS:
            file = values["config"]
            CONFIGS[words[0]].load(file if file is None else ROOT / file, values["sets"])
    except UserError as error:
        return [f"'{command}': {error}"]
    except Exception as error:
        if not hasattr(error, "format_message"):  # of click, whichever one typer carries
            raise
        return [f"'{command}': {error.format_message()}"]
    return []


def module_problems(command: str) -> list[str]:
    """`python -m` modules that are not there, and options that no source of a script mentions."""
    wrong = []
    for name in MODULE.findall(command):
        spec = importlib.util.find_spec(name) if _parent_exists(name) else None
        if spec is None:
            wrong.append(f"'{command}': no module '{name}'")
        elif name.startswith("scripts."):
            source = "".join(_sources(name))
            names = {
                each: re.compile(f'"(?:--)?{each[2:].replace("-", "[-_]")}"') for each in OPTION.findall(command)
            }  # some add the dashes
            wrong += [f"'{command}': no option '{each}'" for each, name in names.items() if not name.search(source)]
    return wrong


def _parent_exists(name: str) -> bool:
    parts = name.split(".")[:-1]
    return all(importlib.util.find_spec(".".join(parts[: end + 1])) for end in range(len(parts)))


def _sources(name: str) -> Iterator[str]:
    """The text of a script and of those it imports, where its options may be."""
    text = "".join(path.read_text(encoding="utf-8") for path in _files(name))
    yield text
    for other in re.findall(r"^from (scripts\.[\w.]+) import", text, re.MULTILINE):
        yield from (path.read_text(encoding="utf-8") for path in _files(other))


def _files(name: str) -> list[Path]:
    """The file of a module; of a package none."""
    return list(ROOT.glob(f"{name.replace('.', '/')}.py"))


def python_problems(block: str) -> list[str]:
    """Code that does not compile, and names of structprune that it imports or uses and that are not there."""
    try:
        tree = ast.parse(block)
    except SyntaxError as error:
        return [f"Python block, line {error.lineno}: {error.msg}"]
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "structprune":
            wrong += [each for alias in node.names if (each := name_problem(f"{node.module}.{alias.name}"))]
        elif isinstance(node, ast.Attribute) and (name := dotted(node)).startswith("structprune."):
            wrong += [each] if (each := name_problem(name)) else []
    return wrong


def dotted(node: ast.expr) -> str:
    """`structprune.Config.load` of an attribute of attributes of a name; empty for another expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (inner := dotted(node.value)):
        return f"{inner}.{node.attr}"
    return ""


def name_problem(name: str) -> str | None:
    """Why a dotted name of structprune does not resolve; None where it does."""
    value = importlib.import_module("structprune")
    for end, part in enumerate(name.split(".")[1:], 2):
        if not hasattr(value, part):
            try:
                importlib.import_module(".".join(name.split(".")[:end]))
            except ImportError:
                return f"Python block: no '{name}'"
        value = getattr(value, part)
    return None


def main() -> int:
    wrong = [f"{path.relative_to(ROOT)}: {problem}" for path in pages() for problem in problems(path)]
    print("\n".join(wrong) or f"{len(pages())} pages: every link, path, command, key, module and import exists")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
