"""What the pages say of the code is so: commands parse, paths exist, links lead somewhere."""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import tyro

from docs.generate.__main__ import PAGES
from docs.generate.site_files import (
    LINK,
    external_resources,
    external_style_resources,
    link_target,
    mend_links,
    site_path,
)
from opd.cli.main import COMMANDS
from tests.helpers.paths import ROOT

DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "benchmarks" / "README.md",
        ROOT / "figures" / "shown" / "README.md",
    )
}
"""Path of every page in the repository -> its text."""

PLACEHOLDERS = {
    "RECIPE": "pair --student STUDENT --teacher TEACHER",
    "NAME": "toy",
    "DIR": "runs/first",
    "FOLDER": "runs/first",
    "COMMAND": "study list",
}
"""Word of a command line that stands for another -> an example."""

GENERATED_HELP = ("docs/commands.md",)

PACKAGES = ("opd", "diagnostics", "synthetic", "figures")
TOP_FOLDERS = (*PACKAGES, "tests", "benchmarks", "examples", "docs")
INDENTED = r"(?<=\n\n)((?: {4}[^\n]*\n)+)"
"""Code blocks without fences."""

REMOVED = re.compile(r"opd\.verl_\w+")
"""Former modules, which CHANGELOG and docs/verl.md name beside the present ones."""


def block_lines(text: str) -> Iterator[str]:
    """Yield the lines of code blocks, with continued lines joined."""
    fenced = re.findall(r"^```(?!text)[^\n]*\n(.*?)^```", text, re.S | re.M)
    indented = re.findall(INDENTED, without_fences(text))
    for block in (*fenced, *indented):
        yield from (line.strip() for line in re.sub(r"\\\n\s*", " ", block).splitlines())


def inline_code(text: str) -> Iterator[str]:
    """Yield the code within running text and tables."""
    for code in re.findall(r"`([^`]+)`", without_fences(text)):
        yield re.sub(r"\s+", " ", code)


def code_lines(text: str) -> list[str]:
    """Return the lines of code blocks and all inline code."""
    return [*block_lines(text), *inline_code(text)]


def without_fences(text: str) -> str:
    """Return a page without its fenced code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def opd_commands() -> list[tuple[str, str]]:
    """Return (page, words after `opd`) of every command line of `opd` on the pages.

    Left out: `[...]`, which stands for arguments, files of tasks, which would be read, the former
    commands in CHANGELOG, and the usages in commands.md.
    """
    commands = []
    for name, text in DOCUMENTS.items():
        for line in dict.fromkeys(code_lines(text)):
            match = re.match(r"(?:torchrun .*? )?opd (?P<words>[^\[]+)$", line)
            if match and "FILE.toml" not in line and name not in ("CHANGELOG.md", *GENERATED_HELP):
                commands.append((name, match["words"]))
    return commands


class ParsedError(Exception):
    """Raised in place of running a command whose arguments were parsed."""


def parse_command(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command line with the command's own parser; raise ParsedError instead of running it.

    A mention such as `opd train --engine hf`, without positional arguments, need not be complete:
    its command and its options must exist.
    """
    for word, example in PLACEHOLDERS.items():
        words = re.sub(rf"\b{word}\b(?!:)", example, words)
    command, *arguments = shlex.split(words.replace("...", ""), comments=True)
    assert command in COMMANDS
    if not arguments or arguments[0].startswith("-") or "--help" in arguments:
        options = re.findall(r"--[a-z][a-z-]*", " ".join(arguments))
        assert all(option in options_of(command) for option in options)
        raise ParsedError
    cli = tyro.cli

    def build_and_stop(*args: object, **options: object) -> object:
        built = cli(*args, **options)
        if options.get("return_unknown_args"):  # a first look at the arguments
            return built
        raise ParsedError(built)

    monkeypatch.setattr(tyro, "cli", build_and_stop)
    import_module(COMMANDS[command][0]).main(arguments)


def options_of(command: str) -> set[str]:
    """Return the options that the generated pages list for a command."""
    text = DOCUMENTS["docs/commands.md"].split(f"\n## opd {command}\n")[1].split("\n## ")[0]
    options = set(re.findall(r"--[a-z][a-z-]*", text))
    if command in ("train", "plan"):
        names = re.findall(r"^\| `(\w+)`<br>", DOCUMENTS["docs/settings.md"], re.M)
        options |= {"--" + name.replace("_", "-") for name in names}
    return options


@pytest.mark.parametrize(("page", "words"), opd_commands())
def test_every_command_parses(page: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParsedError):
        parse_command(words, monkeypatch)


@pytest.mark.parametrize(
    "words",
    [
        *("train lab --learning-rate 1", "train --learning-rate 1", "study run", "lab --large"),
        *("trian lab", "figures toy --no-such-option", "doctor STUDENT TEACHER --teachers 2"),
    ],
)
def test_a_wrong_command_would_be_found(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        parse_command(words, monkeypatch)


def test_programs_and_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    num_programs = 0
    for name, text in DOCUMENTS.items():
        for line in code_lines(text):
            for module in re.findall(rf"\bpython -m ((?:{'|'.join(TOP_FOLDERS)})[\w.]*)", line):
                num_programs += 1
                path = ROOT.joinpath(*module.split("."))
                is_program = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
                assert is_program, f"{name}: {line}"
            if match := re.match(r"make ((?:[a-z][\w-]*)(?: [a-z][\w-]*)*)", line):
                for target in match[1].split():
                    assert re.search(rf"^{target}:", makefile, re.M), f"{name}: {line}"
    assert num_programs > 10


def test_paths_exist() -> None:
    num_paths = 0
    for name, text in DOCUMENTS.items():
        for code in code_lines(text):
            for path in re.findall(rf"(?<![\w/.])(?:{'|'.join(TOP_FOLDERS)})/[\w./-]*\w", code):
                if "NAME" in path or "missing_future" in path:
                    continue
                num_paths += 1
                assert (ROOT / path).exists(), f"{name}: {path}"
    assert num_paths > 80


def defined_names(module: Path) -> set[str]:
    """Return the names that a module defines, imports or exports at its top level."""
    names: set[str] = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names |= set(ast.literal_eval(node.value))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {
                x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)
            }
    return names


def resolves(dotted: str) -> bool:
    """Return whether a dotted name is a package, a module or a name that a module defines."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        module = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if module.exists():
            return length == len(parts) or parts[length] in defined_names(module)
    return False


def test_modules_and_names_exist() -> None:
    num_names = 0
    for page, text in DOCUMENTS.items():
        for code in code_lines(text):
            for dotted in re.findall(rf"\b(?:{'|'.join(PACKAGES)})(?:\.\w+)+", code):
                is_file = re.search(r"\.(py|md|json|csv|png)$", dotted)
                if is_file or REMOVED.fullmatch(dotted):
                    continue
                num_names += 1
                assert resolves(dotted), f"{page}: {dotted}"
    assert num_names > 50
    assert not resolves("opd.training.no_such_module")
    assert not resolves("diagnostics.monitor.no_such_name")


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as mkdocs and repository viewers name them."""
    text = without_fences(text)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", DOCUMENTS)
def test_links_lead_somewhere(page: str) -> None:
    text = without_fences(DOCUMENTS[page])
    for path, anchor in LINK.findall(text):
        target = link_target(path, page)
        assert (ROOT / target).exists(), f"{page}: {path}"
        if anchor:
            assert anchor[1:] in anchors(DOCUMENTS[target]), f"{page}: {path}{anchor}"
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in anchors(text), f"{page}: #{anchor}"


def test_links_of_the_site_lead_to_its_pages() -> None:
    mended = mend_links("[a](docs/scale.md#time) ![b](figures/shown/toy.png) [c](#d)", "README.md")
    assert mended == "[a](scale.md#time) ![b](figures/toy.png) [c](#d)"
    mended = mend_links("[a](../../docs/claims.md) ![b](toy.png)", "figures/shown/README.md")
    assert mended == "[a](../claims.md) ![b](toy.png)"
    mended = mend_links("[a](../benchmarks/README.md) [b](https://x.org/y.md)", "docs/scale.md")
    assert mended == "[a](benchmarks.md) [b](https://x.org/y.md)"


@pytest.mark.parametrize("page", [page for page in DOCUMENTS if site_path(page)])
def test_links_to_pages_and_tables_stay_on_the_site(page: str) -> None:
    for path, _ in LINK.findall(without_fences(DOCUMENTS[page])):
        target = link_target(path, page)
        assert site_path(target) is not None, f"{page}: {path} is not on the site"


def test_resources_from_other_servers_are_found() -> None:
    html = (
        '<a href="https://a.org">x</a><link rel="canonical" href="https://b.org">'
        '<img src="c.png"><script src="//d.org/x.js"></script><img srcset="e.png, https://f.org/g">'
        '<link rel="stylesheet" href="HTTPS://h.org/i.css">'
        '<style>@import "https://j.org/k.css"; b {background: url(//l.org/m.png)}</style>'
    )
    assert external_resources(html) == [
        *("//d.org/x.js", "https://f.org/g", "HTTPS://h.org/i.css"),
        *("https://j.org/k.css", "//l.org/m.png"),
    ]
    assert external_style_resources("a {b: url('data:x'); c: url(https://n.org/o)}") == [
        "https://n.org/o"
    ]


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_up_to_date(name: str) -> None:
    assert DOCUMENTS[f"docs/{name}.md"] == PAGES[name](), f"python -m docs.generate {name}"


def test_readme_is_short() -> None:
    text = DOCUMENTS["README.md"]
    assert len(text.split()) <= 1000
    blocks = [*re.findall(r"```python\n(.*?)```", text, re.S), *re.findall(INDENTED, text)]
    assert len(blocks) > 5
    for block in blocks:
        lines = [line for line in block.splitlines() if line.strip()]
        assert sum(not line.startswith(("from ", "import ")) for line in lines) <= 10


def test_hooks_run_what_make_lint_runs() -> None:
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    commands = [
        line.strip().replace("$(BIN)", ".venv/bin").replace("$(VENV)", ".venv")
        for line in lint.splitlines()
    ]
    hooks = re.findall(r"entry: (.+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(commands) == 5
    assert set(commands) < set(hooks)
    for hook in hooks:
        for path in re.findall(r"tests/\S+", hook):
            assert (ROOT / path).exists()


def test_the_extra_docs_is_what_make_docs_installs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {re.split("[><=]", name)[0] for name in project["optional-dependencies"]["docs"]}
    makefile = (ROOT / "Makefile").read_text()
    (line,) = re.findall(r"-c constraints-docs.txt (.+)", makefile)
    assert set(shlex.split(line)) == extra
    assert "mkdocs build --strict\n" in makefile  # with --quiet, mkdocs counts no warnings
    constraints = (ROOT / "constraints-docs.txt").read_text()
    assert all(f"{name.split('[')[0]}==" in constraints for name in extra)


def test_the_citation_has_the_present_version_and_licence() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {project['version']}\n" in citation
    assert f"\nlicense: {project['license']}\n" in citation
    assert "arxiv.org/abs/2603.25562" in citation
