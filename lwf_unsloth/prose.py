"""A text taken apart: code, tables, prose, sentences, words; in English, Japanese and others."""

import re
import unicodedata
from dataclasses import dataclass

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f々〆"
"""Scripts written without spaces, as a range of a regular expression: each letter is a token."""

_TOKEN = re.compile(rf"[{CJK}]|[^\W_{CJK}]+(?:['’][^\W_{CJK}]+)*|[^\s]")
_WORD = re.compile(rf"[^\W_{CJK}]+(?:['’.-][^\W_{CJK}]+)*")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]*_]*(?=\s|$)|[。！？!?…]+[」』）”’)]*|\n+")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:[A-Za-z]|(?:[A-Za-z]\.)+[A-Za-z]|e\.g|i\.e|etc|vs|cf|approx|Mr|Mrs|Ms|Dr|Prof|"
    r"St|No|Fig|Jr|Sr|Inc|Ltd|Co|Mt)$"
)
_LONGEST_ABBREVIATION = 24
"""Characters before a point that can be one: a text of abbreviations alone stays linear."""
_ITEM_NUMBER = re.compile(r"\s{0,9}\(?\d{1,3}")
LIST_MARK = re.compile(
    r"^[ \t]*(?:[-*+–][ \t]+|[•・●○◦‣▪■][ \t]*|\(?\d{1,3}(?:[.)）．:][ \t]*|、)(?!\d)|[①-⑳]|"
    r"\(?[a-zA-Z][.)][ \t]+)(?=\S)"
)
"""What a list item begins with."""

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+#.-]*)[^`\n]*$")
_STRONG = re.compile(
    r"^\s*(?:(?:async )?def \w+\s*\(|class \w+[^.]*[:{]\s*$|from [\w.]+ import |import [\w.]+"
    r"(?: as \w+)?(?:, *[\w.]+)*;?\s*$|#include\b|(?:export |async )*function\b\s*\w*\s*\(|"
    r"(?:public|private|protected|static) .*[({;]|(?:const|let|var) \w+ *=|using namespace |"
    r"(?:SELECT|INSERT INTO|CREATE TABLE|DELETE FROM|UPDATE|WITH \w+ AS)\b|"
    r"<(?:!DOCTYPE|html|body|div|table|ul|form|script|style|head|p|h[1-6])\b|#!/|fn \w+|func \w+|"
    r"(?:int|void|double|float|char|bool|String|long) \w+\s*[(=;\[])"
)
_WEAK = re.compile(
    r"^\s*(?:(?:for|while|if|elif|else|try|except|finally|with|switch|case)\b.*[:{]\s*$|"
    r"(?:for|while|if|switch) *\(.*|[})\]].*|.*[;{]\s*$|[A-Za-z_][\w.]*(?:\[[^\]]*\])? *"
    r"(?:[-+*/%|&]|//)?=(?!=) *\S.*|[A-Za-z_][\w.]*\([^)]*\)?\)*;?\s*$|"
    r"[A-Za-z_][\w.]*\.\w+\(.*|@\w+.*|"
    r"(?:FROM|WHERE|GROUP BY|ORDER BY|JOIN|VALUES|SET|LIMIT|HAVING)\b.*|</?[a-z][^>]*>.*)"
)
_JSON = re.compile(r"^\s*(?:\{\s*(?:[\"'}]|$)|\[\s*(?:[\"{\[\]\d-]|$))")


@dataclass(frozen=True)
class Part:
    """A stretch of lines of one kind."""

    kind: str
    """"prose", "code" or "table"."""
    start: int
    """Place of its first character in the text."""
    text: str
    """Its lines; of fenced code without the fences."""
    open: bool = False
    """Fenced code whose closing fence is not there."""
    language: str = ""
    """What the fence says of the code's language, in small letters."""

    @property
    def end(self) -> int:
        """Place after its last character."""
        return self.start + len(self.text)


def parts(text: str) -> list[Part]:
    """The text as code, tables and prose, in order; lines that are blank alone make no part."""
    lines, at = [], 0
    for line in text.splitlines(keepends=True):
        lines.append((at, line))
        at += len(line)
    found: list[Part] = []
    i = 0
    while i < len(lines):
        fence = _FENCE.match(lines[i][1].rstrip("\n"))
        if fence:
            end = i + 1
            while end < len(lines) and not _closes(lines[end][1].strip(), fence[1]):
                end += 1
            body = "".join(line for _, line in lines[i + 1 : end])
            start = lines[i][0] + len(lines[i][1])
            found.append(Part("code", start, body, end == len(lines), fence[2].lower()))
            i = end + 1
            continue
        end = i + 1
        while end < len(lines) and not _FENCE.match(lines[end][1].rstrip("\n")):
            end += 1
        found += _unfenced(lines[i:end])
        i = end
    return found


def _closes(line: str, fence: str) -> bool:
    """Whether a line ends fenced code: the marks it began with, or more of them."""
    return line.startswith(fence) and not line.strip(fence[0])


def _unfenced(lines: list[tuple[int, str]]) -> list[Part]:
    """Code without a fence, tables and prose of lines that hold no fence."""
    kinds: list[str] = []
    if _JSON.match("".join(line for _, line in lines)):
        kinds = ["code"] * len(lines)
    else:
        kinds = [_kind(line) for _, line in lines]
        _settle_code(lines, kinds)
    found: list[Part] = []
    i = 0
    while i < len(lines):
        end = i + 1
        while end < len(lines) and kinds[end] in (kinds[i], ""):
            end += 1
        text = "".join(line for _, line in lines[i:end])
        if text.strip():
            found.append(Part(kinds[i] or "prose", lines[i][0], text))
        i = end
    return found


def _kind(line: str) -> str:
    """What a line looks like by itself: prose, table, strong or weak signs of code, or blank."""
    if not line.strip():
        return ""
    if line.lstrip().startswith("|") and line.count("|") >= 2:
        return "table"
    bare = line.strip()  # the patterns never meet a long run of spaces
    if _STRONG.match(bare):
        return "strong"
    return "weak" if _WEAK.match(bare) and not LIST_MARK.match(line) else "prose"


def _settle_code(lines: list[tuple[int, str]], kinds: list[str]) -> None:
    """Runs of code-like lines become code where one is strong or two are weak; else prose."""
    i = 0
    while i < len(kinds):
        if kinds[i] not in ("strong", "weak"):
            i += 1
            continue
        end = i + 1
        while end < len(kinds) and (
            kinds[end] in ("strong", "weak", "")
            or lines[end][1][0] in " \t"
            or lines[end][1].startswith(("#", "//"))
        ):
            end += 1
        while not kinds[end - 1]:
            end -= 1
        run = kinds[i:end]
        kind = "code" if "strong" in run or run.count("weak") >= 2 else "prose"
        for at in range(i, end):
            kinds[at] = kind
        i = end


def plain_prose(text: str) -> str:
    """The prose alone, without code and tables."""
    return "".join(part.text for part in parts(text) if part.kind == "prose")


def tokens(text: str) -> list[tuple[str, int, int]]:
    """Words and single marks as (in small letters, start, end); letters where no spaces are."""
    return [(m.group().casefold(), m.start(), m.end()) for m in _TOKEN.finditer(text)]


def sentences(text: str) -> list[tuple[int, int]]:
    """Spans of the sentences and list items; an abbreviation's point ends none."""
    found, start, last = [], 0, len(text.rstrip())
    for match in _SENTENCE_END.finditer(text):
        point, end = match.group().startswith("."), match.start()
        before = text[max(start, end - _LONGEST_ABBREVIATION) : end]
        if point and match.end() < last and _ABBREVIATION.search(before):
            continue
        if point and _ITEM_NUMBER.fullmatch(text, start, end):
            continue
        found.append((start, match.end()))
        start = match.end()
    return [
        _trimmed(text, *span) for span in [*found, (start, len(text))] if text[slice(*span)].strip()
    ]


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without spaces at its ends."""
    piece = text[start:end]
    return end - len(piece.lstrip()), start + len(piece.rstrip())


def words(text: str) -> int:
    """Number of words, of scripts with spaces."""
    return len(_WORD.findall(text))


def letters(text: str) -> int:
    """Number of characters but spaces."""
    return sum(not character.isspace() for character in text)


def size(text: str) -> float:
    """Length in words; three letters of a script without spaces count as one."""
    return words(text) + len(re.findall(f"[{CJK}]", text)) / 3


def same(text: str) -> str:
    """The text for comparing: compatible letters, small, single spaces, no list mark in front."""
    text = unicodedata.normalize("NFKC", LIST_MARK.sub("", text)).casefold()
    return " ".join(text.split())


def items(text: str) -> list[str]:
    """The list items of the outermost level, without their marks."""
    found = [line for line in text.splitlines() if LIST_MARK.match(line)]
    depth = [len(line) - len(line.lstrip()) for line in found]
    outer = min(depth, default=0)
    return [LIST_MARK.sub("", f) for f, d in zip(found, depth, strict=True) if d == outer]
