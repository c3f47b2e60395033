"""A script's docstring: its title, the texts under Target, Change, Result and Analysis, and what it is compared with,
by lines such as "Compared with step3_gap: dropout of 0.1."
"""

import ast
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mnist_lab.errors import LabError

HEADINGS = ("Target", "Change", "Result", "Analysis")
NAME = r"[\w.-]+"
AND = r"(?:,\s*and\s+|,\s*|\s+and\s+)"
COMPARED = re.compile(  # with which steps, and by what: to the end of the paragraph, or to another such line
    rf"^[Cc]ompared (?:with|to) ({NAME}(?:{AND}{NAME})*)\s*: (.+?)\.?\s*"
    rf"(?=^\s*$|^[Cc]ompared (?:with|to) [^:\n]*: |^(?:{'|'.join(HEADINGS)}):|\Z)",
    flags=re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Story:
    """A script's docstring: its title, the text before the headings, and the headings with their texts.

    compared_with: other experiments, and the change from each to this one. trouble: why it can't be read.
    """

    title: str = ""
    opening: str = ""
    sections: Sequence[tuple[str, str]] = ()
    compared_with: Sequence[tuple[str, str]] = ()
    trouble: str = ""

    @property
    def missing(self) -> list[str]:
        return [heading for heading in HEADINGS if heading not in dict(self.sections)]

    def markdown(self, *headings: str) -> str:
        """Return the story with a paragraph for each of these headings, all if none is given, without HTML."""
        title = f"**{self.title}**" if self.title else ""
        sections = [f"**{name}:** {text}" for name, text in self.sections if name in (headings or HEADINGS)]
        return html.escape("\n\n".join(part for part in (title, self.opening, *sections) if part), quote=False)


def read_story(script: Path) -> Story:
    """Read the story in a script's docstring, without importing it; raises LabError if it can't be read."""
    try:
        docstring = ast.get_docstring(ast.parse(script.read_bytes(), script.name)) or ""
    except (OSError, SyntaxError, ValueError) as error:
        raise LabError(f"script {script} can't be read: {error}") from error
    before, *parts = re.split(rf"^({'|'.join(HEADINGS)}):", docstring, flags=re.MULTILINE)
    title, _, opening = before.strip().partition("\n\n")
    sections = list(zip(parts[::2], map(str.strip, parts[1::2]), strict=True))
    compared = [
        (step.removesuffix(".py"), " ".join(change.split()))
        for steps, change in COMPARED.findall(docstring)
        for step in re.split(AND, steps)
    ]
    return Story(" ".join(title.split()).removesuffix("."), opening, sections, compared)


def read_stories(scripts: Path) -> dict[str, Story]:
    """Return the stories of a folder's scripts, by their names; of one that can't be read, only the trouble with it."""
    stories = {}
    for script in scripts.glob("[!_]*.py"):
        try:
            stories[script.stem] = read_story(script)
        except LabError as error:
            stories[script.stem] = Story(trouble=str(error))
    return stories
