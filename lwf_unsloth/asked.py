"""What a prompt asks an answer to look like, read from its words, and whether the answer does.

English and Japanese. Only what is asked for in so many words counts: a dress code asks for no
code, the periodic table for no table.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from lwf_unsloth.languages import LANGUAGES, mismatch
from lwf_unsloth.lengths import asked_lengths
from lwf_unsloth.prose import items, parts

_NUMBERS = {
    word: n
    for n, word in enumerate("two three four five six seven eight nine ten".split(), start=2)
} | {kanji: n for n, kanji in enumerate("二三四五六七八九十", start=2)}
_NUMBER = r"(\d{1,2}|" + "|".join(_NUMBERS) + ")"

_TABLE = re.compile(
    r"\b(?:in|as|with|into|using|by|make|create|draw|build|give|show|write|produce|prepare|provide|"
    r"generate|print|add)\b(?: me| us)? (?:an?|one|this|markdown|the form of an?)"
    r"(?: [\w-]+){0,3}? table\b(?! tennis| manners| ?cloth|spoon| of contents| lamp| legs?| and "
    r"(?:a |two |four |some )?(?:chairs?|sofa|bed))|\bin table(?:s| form)|\btable format|"
    r"\btabular\b|\btabulate\b"
    r"|(?<![代発公年図辞時刻裏])(?:表|テーブル)(?:形式)?(?:で(?!き|す|は)|に(?:ま|し|整)|として|を作|を書)"
    r"|(?<![代発公年])(?:表形式|表組み)|テーブル形式|一覧表",
    re.I,
)
_NO_TABLE = re.compile(
    r"\bSQL\b|database|CREATE TABLE|(?:dining|kitchen|coffee|wooden|round) table|"
    r"\b(?:multiplication|times) table",
    re.I,
)
_LIST = re.compile(
    r"\bbullet(?:s|ed)?\b|\bbullet[- ]?points?\b|\bnumbered (?:list|steps|points)|\bordered list|"
    r"\bas (?:a |the form of a )(?:[\w-]+ )?list\b(?! of (?:numbers|integers|strings))|"
    r"\bin(?: the form of)? a (?:(?:bulleted|numbered|short|simple) )?list(?=\s*(?:[.!?:,]|$))|"
    r"\blist form(?:at)?\b|\bmake a list\b|\bchecklist\b|箇条書き|リスト形式|番号付き|リストにし|"
    r"リストアップ|リストで",
    re.I,
)
_ITEMS = re.compile(
    r"\b(?:list|name|give|provide|suggest|write|recommend)\b(?: me| us)?(?: the| exactly)? "
    rf"{_NUMBER}\b|{_NUMBER}(?:つ|個|点|項目|選)(?:、)?(?:ほど)?(?:挙げ|教え|書|リスト|箇条書き|紹介|あげ)",
    re.I,
)
_NAMES = r"python|javascript|typescript|java|c\+\+|c#|sql|rust|golang|go|ruby|php|bash|html|css|c|r"
_CODE = re.compile(
    r"\b(?:write|create|give|show|implement|provide|generate|make|build|develop|produce|use)\b"
    r"[^.?!\n]{0,60}?(?<!dress )(?<!zip )(?<!area )(?<!morse )(?<!qr )(?<!promo )(?<!bar )"
    r"\b(?:source |sample )?code\b(?! of\b)"
    r"|\b(?:write|create|implement|build|develop|make|generate|give)\b[^.?!\n]{0,30}?\b"
    rf"(?:{_NAMES}) (?:\w+ )?(?:code|function|program|script|class|query|method|module|snippet|"
    r"page)"
    r"|\b(?:answer|reply|respond) with code\b|(?<!バー)(?<!QR)コードで(?:答|示|書)"
    r"|\bimplement\b[^.?!\n]{0,60}?"
    rf"(?:\b(?:function|class|method|algorithm)\b|\bin (?:{_NAMES})(?![\w+#]))"
    rf"|\b(?:write|create|develop)\b[^.?!\n]{{0,60}}?\bin (?:{_NAMES})(?![\w+#])"
    r"|\b(?:write|create|implement|develop) (?:an?|the) (?:[\w-]+ )?(?:function|program|script|"
    r"query|regex|regular expression)\b (?:that|which|to|for|in)\b"
    r"|(?<!バー)(?<!QR)(?<!ドレス)(?<!電源)(?<!郵便)(?:コード|スクリプト|関数|クエリ|SQL文|正規表現|"
    r"(?<!研修)(?<!運動)(?<!トレーニング)(?<!教育)プログラム)(?:を|の例を)[^。\n]{0,12}?(?:書|作|実装|示|生成)"
    rf"|(?:{_NAMES})で[^。\n]{{0,30}}?(?:書い|実装|作っ|作成)",
    re.I,
)
_JSON = re.compile(
    r"\b(?:in|as|into|to|return|output|give|valid)\b (?:(?:an?|valid|the|result|only) ){0,2}"
    r"JSON\b(?! files?\b)"
    r"|JSON (?:object|array|format|with|string|only)|JSON(?:形式|で|に|として|を(?:返|出力|書|作))",
    re.I,
)
_NO_JSON = re.compile(r"\bwhat (?:is|are)\b|\bexplain\b|\bdifference\b|とは|違い", re.I)


@dataclass(frozen=True)
class Wish:
    """One thing that a prompt asks of the form of its answer."""

    form: str
    """"table", "list", "code", "json", "language" or "length"."""
    missing: Callable[[str, bool], str]
    """Of the answer and whether it was cut: what is missing, in words; "" where nothing is."""


def wishes(prompt: str) -> list[Wish]:
    """Everything a prompt asks of the form of its answer.

    Args:
        prompt: The instruction, without its input.
    """
    found = []
    code = bool(_CODE.search(prompt))
    if not code and _TABLE.search(prompt) and not _NO_TABLE.search(prompt):
        found.append(Wish("table", _no_table))
    count = _asked_items(prompt)
    if not code and _LIST.search(prompt):
        found.append(Wish("list", lambda text, cut: _no_list(text, cut, count)))
    elif not code and count:
        found.append(Wish("list", lambda text, cut: _other_count(text, cut, count)))
    if code:
        found.append(Wish("code", lambda text, _: _no_code(text)))
    elif _JSON.search(prompt) and not _NO_JSON.search(prompt):
        found.append(Wish("json", _no_json))
    wanted = next((language for language in LANGUAGES if language.asked(prompt)), None)
    if wanted:
        found.append(Wish("language", lambda text, _: mismatch(text, wanted)))
    found += [Wish("length", length.missing) for length in asked_lengths(prompt)]
    return found


def has_form(form: str, text: str) -> bool:
    """Whether a text holds a form: "table", "list", "code" or "json"."""
    if form == "list":
        return not _no_list(text, False, 0)
    if form == "code":
        return any(part.kind == "code" for part in parts(text))
    return not {"table": _no_table, "json": _no_json}[form](text, False)


def _asked_items(prompt: str) -> int:
    """How many items are asked for; 0 where no number is named."""
    match = _ITEMS.search(prompt)
    number = next((group for group in match.groups() if group), "") if match else ""
    return int(number) if number.isdigit() else _NUMBERS.get(number.lower(), 0)


def _no_table(text: str, cut: bool) -> str:
    """A table is rows of as many cells: in pipes, tabs, wide gaps or HTML."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" \t-+=")]
    for pattern in (r"(?<!\\)\|", r"\t+", r" {2,}(?=\S)"):
        widths = [len(re.findall(pattern, line.strip("|"))) for line in lines]
        for one, two in zip(widths, widths[1:], strict=False):
            if one and (one == two or (cut and two)):
                return ""
    if re.search("<table|CREATE TABLE", text, re.I) or (cut and text.count("|") >= 2):
        return ""
    return "no table"


def _no_list(text: str, cut: bool, count: int) -> str:
    found = len(items(text))
    if found < (1 if cut or count == 1 else 2):
        return "no list"
    return _other_count(text, cut, count)


def _other_count(text: str, cut: bool, count: int) -> str:
    """Of a list, the number of its items; an answer in running text is not counted."""
    found = len(items(text))
    if not count or found < 2 or found == count or (cut and found < count):
        return ""
    return f"{found} items instead of {count}"


def _no_code(text: str) -> str:
    block = any(part.kind == "code" and part.text.strip() for part in parts(text))
    if block or re.search(r"`[^`\n]+`", text):
        return ""
    one = text.strip()  # a regular expression is a word of marks
    return (
        "" if one and not re.search(r"\s", one) and re.search(r"[\\^$\[\]{}|]", one) else "no code"
    )


def _no_json(text: str, cut: bool) -> str:
    """The whole answer, or a fenced block of it, must parse."""
    whole = text.strip()
    found = [part for part in parts(text) if part.kind == "code"]
    blocks = [part.text.strip() for part in found]
    for candidate in [whole, *blocks]:
        try:
            if isinstance(json.loads(candidate), (dict, list)):
                return ""
        except (ValueError, RecursionError):
            continue
    starts = any(candidate[:1] in ("{", "[") for candidate in [whole, *blocks])
    ends = found[-1].end >= len(text.rstrip()) if found else False
    if starts and cut and ends:
        return ""
    if starts:
        return "JSON that does not parse"
    for match in re.finditer(r"[{\[]", text):
        try:
            value, end = json.JSONDecoder().raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, (dict, list)) and value and end - match.start() > len(whole) / 3:
            return ""
    return "no JSON"
