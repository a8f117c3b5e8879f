"""The documentation: the site builds without a warning, and every page can be reached."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)")


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(DOCS.glob("**/*.md"))]


def test_relative_links_lead_somewhere():
    broken = {
        str(page.relative_to(ROOT)): link
        for page in pages()
        for link in LINK.findall(page.read_text(encoding="utf-8"))
        if not (page.parent / link).exists()
    }
    assert not broken


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / ".mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = set(re.findall(r"[\w/]+\.(?:md|ipynb)", navigation))
    there = {str(path.relative_to(DOCS)) for path in pages()[1:]} | {
        f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")
    }
    assert named == there


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """With --strict: links, anchors, names in the API and the navigation that lead nowhere are errors (but not with --quiet)."""
    pytest.importorskip("mkdocs_jupyter", reason="the extra `docs` is not installed")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        str(ROOT / ".mkdocs.yml"),
        "-d",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    for page, words in {
        "api/kernels": "mhc_post_pre",
        "reproduced": "What was reproduced",
        "notebooks/birkhoff_geometry": "image/png",
    }.items():
        assert words in (tmp_path / "site" / page / "index.html").read_text(encoding="utf-8")
