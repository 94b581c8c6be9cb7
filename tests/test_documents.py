"""Promises of the pages: they are found, they are short, and what they list is what there is."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_mmfuser import MMFuserConfig, __main__, __version__

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def prose(page):
    """A page without its blocks and pieces of code."""
    return re.sub(r"`[^`\n]*`", "``", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S))


def links(page):
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page):
    """What GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


def table(page, head):
    """Rows of the table whose head starts so, as lists of cells."""
    lines = (ROOT / page).read_text().split(f"\n| {head}", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_and_anchor_exists(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        if not link.startswith(("http://", "https://")):
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_readme_is_one_page_and_leads_to_all_others():
    assert len(README.read_text().splitlines()) <= 120
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(README)}
    assert set(PAGES) - {README} <= linked
    for page in (ROOT / "docs").glob("*.md"):
        assert "../README.md#pages" in links(page), page


def test_flags_page_lists_exactly_the_flags_with_their_defaults():
    shown = {name.strip("`-"): default.strip("`") for name, default, _ in table("docs/flags.md", "flag")}
    fields = {f"mm_fuser_{field.name}": str(field.default) for field in dataclasses.fields(MMFuserConfig)}
    fields["mm_fuser_layers"] = "uniform"
    training = {"mm_fuser_lr": "the projector's", "mm_fuser_log_gates": "True"}
    training["mm_fuser_gate_lr"] = "see [below](#will-it-wake-up)"
    assert shown == {"mm_vision_select_layer": "LLaVA's", **fields, **training}


def test_flags_page_lists_exactly_the_fusions():
    names = [cells[0] for cells in table("docs/flags.md", "`--mm_fuser_fusion` | what")]
    shown = re.findall(r"`(\w+)`", " ".join(names))
    with pytest.raises(ValueError) as refusal:
        MMFuserConfig(fusion="none of them")
    assert sorted(shown) == sorted(str(refusal.value).split("; use ")[1].split(" or "))


def test_flags_page_shows_the_named_sets_of_layers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["llava_mmfuser", "layers", "24"])
    assert __main__.main() == 0
    sets = dict(line.split() for line in capsys.readouterr().out.splitlines())
    sets["all"] = "0,1,…,23" if sets["all"] == ",".join(map(str, range(24))) else sets["all"]
    assert {name.strip("`"): layers.replace(" ", "") for name, layers, _ in table("docs/flags.md", "ViT-L")} == sets


def test_snippets_of_the_block_run(tmp_path):
    for page in (README, ROOT / "docs" / "block.md"):
        (snippet,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.M | re.S)
        assert "assert " in snippet
        subprocess.run([sys.executable, "-c", snippet], check=True, cwd=tmp_path)


def test_version_is_the_same_everywhere():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## \[{re.escape(__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)


def test_long_description_has_no_relative_links():
    """The package's page on an index is not in the repository."""
    found = subprocess.run(
        [sys.executable, "setup.py", "--long-description"], cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True
    ).stdout
    assert "[MMFuser](https://arxiv.org" in found and "The study, 17 arms" in found
    assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)\s]+)\)", found))
