"""Whether a text ends where something ends: a sentence, a list item, a table row, code."""

import re

from lwf_unsloth.prose import CJK, LIST_MARK, Part, parts, size

_CLOSERS = "\"'”’」』）)]*_`~>»】"
_STOPS = ".!?。！？…．｡♪♡♥☺"
_DANGLING = re.compile(
    r"(?:^|[\s(])(?:a|an|the|of|to|and|or|but|with|for|at|by|from|that|which|who|whose|because|than|"
    r"into|their|your|his|her|my|our|these|would|could|should|must|when|while|if|although|since|"
    r"between|about|such|very|more|most|is|are|was|were|has|have|had|will|can|may|be|been|do|does|"
    r"not|in|on|as|its|this)$",
    re.I,
)
_JAPANESE_DANGLING = re.compile(
    r"(?:[をはにの]|から|ので|より|ため|として|という|また|そして|しかし)$"
)
_OPEN_LINE = re.compile(
    r"(?:[-+*/%=<>&|^,(\[{\\]|(?<!:):|\b(?:in|and|or|not|return|import|new|=>))\s*$"
)

_TAG_AT_END = re.compile(r"</[\w:.-]+\s*>$|/>$|-->$|<[a-zA-Z][^<>]*>$")
"""A tag of HTML or XML, whose last mark is no comparison."""


def ends_inside_code(text: str, stop: str) -> bool | None:
    """Whether the text ends inside code.

    Args:
        text: The answer.
        stop: "eos", "length", or "" where it is not known.

    Returns:
        None where it does not end with code at all.
    """
    found = parts(text)
    last = found[-1] if found else None
    if last is None or last.kind != "code":
        return None
    fenced = last.end < len(text.rstrip())  # a closing fence stands behind it
    if fenced and not last.open:
        return False
    return stop == "length" or incomplete(last)


def incomplete(code: Part) -> bool:
    """Whether brackets or a text stay open, or the last line wants more."""
    lines = [line for line in code.text.splitlines() if line.strip()]
    if not lines:
        return True
    depth, quote = _scan(code.text)
    last = lines[-1].rstrip()
    if last.lstrip().startswith(("#", "//", "--")):
        return depth > 0
    closed = last.endswith("*/") or bool(_TAG_AT_END.search(last))
    return depth > 0 or bool(quote) or bool(_OPEN_LINE.search(last)) and not closed


def _scan(code: str) -> tuple[int, str]:
    """Open brackets, and the quote that the last line leaves open; comments are passed over."""
    depth, quote, i = 0, "", 0
    while i < len(code):
        character = code[i]
        if quote:
            if character == "\\":
                i += 1
            elif code.startswith(quote, i):
                i += len(quote) - 1
                quote = ""
            elif character == "\n" and len(quote) == 1 and quote != "`" and code[i:].strip():
                quote = ""  # an apostrophe: no such text goes over a line's end
        elif code.startswith(('"""', "'''"), i):
            quote = code[i : i + 3]
            i += 2
        elif character in "\"'`":
            quote = character
        elif character == "#" or code.startswith(("//", "-- "), i):
            after = code.find("\n", i)
            i = len(code) if after < 0 else after
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        i += 1
    return depth, quote


def dangling(text: str, stop: str) -> str:
    """Why the text seems to end inside a sentence, list item or table row; "" where it does not.

    An answer that was cut must end like a sentence to count as whole; of one that the model ended,
    only signs that it goes on count, since names and list items need no full stop.
    """
    text = text.rstrip()
    found = parts(text)
    if not found:
        return ""
    if found[-1].kind == "table":
        return _table_row(found[-1].text)
    line = text.splitlines()[-1].strip()
    if re.fullmatch(r"(?:[-*+•・]|\(?\d{1,3}[.)）．])", line):
        return "ends with the mark of a list item"
    bare = text.rstrip(_CLOSERS).rstrip()
    last = bare[-1:]
    if last in (":", "：") and not line.endswith("）"):
        return "ends with a colon"
    if last and (last in _STOPS or _is_symbol(last)) and text[-1] not in "(":
        return ""
    if stop == "length":
        return "no end of a sentence"
    if last in (",", "、", "，", ";", "；") or text[-1] in ("-", "(", "（", "「"):
        return "ends with a mark that goes on"
    if text[-1] in _CLOSERS and last != text[-1]:
        return ""
    return _goes_on(line)


def _is_symbol(character: str) -> bool:
    """An emoji or another symbol that closes a text as a full stop does."""
    return ord(character) >= 0x2600 and not re.match(
        rf"[{CJK}\w\u3000-\u303f\uff00-\uffef]", character
    )


def _table_row(text: str) -> str:
    """A last row that is shorter than the rows above it."""
    rows = [row.strip() for row in text.splitlines() if row.strip()]
    last, before = rows[-1], rows[:-1]
    if before and all(row.endswith("|") for row in before) and not last.endswith("|"):
        return "ends inside a table row"
    if before and last.count("|") < min(row.count("|") for row in before):
        return "ends inside a table row"
    return ""


def _goes_on(line: str) -> str:
    """Signs in the last line of an answer, ended by the model, that its sentence goes on."""
    bare = LIST_MARK.sub("", line)
    if size(bare) >= 5 and _DANGLING.search(bare):
        return "ends with a word that goes on"
    if size(bare) >= 3 and _JAPANESE_DANGLING.search(bare):
        return "ends with a particle"
    if bare.count("(") > bare.count(")") or bare.count("（") > bare.count("）"):
        return "ends with an open bracket"
    return ""
