"""Which natural language a prompt asks for and an answer is in, by script and common words."""

import re
from collections import Counter
from dataclasses import dataclass

from lwf_unsloth.prose import plain_prose

_VERBS = (
    r"answer|reply|respond|write|translate|say|explain|describe|summari[sz]e|speak|rewrite|convert|"
    r"express|tell|put"
)
_NOT_AFTER = (
    r"(?![ -](?:class|history|literature|food|cuisine|cooking|culture|law|people|speak|restaurant|"
    r"compan|school|art|grammar|words?\b|cities|towns|lessons?))"
)
_SCRIPTS = {
    "kana": "\u3040-\u30ff",
    "han": "\u3400-\u4dbf\u4e00-\u9fff",
    "hangul": "\uac00-\ud7af",
    "cyrillic": "\u0400-\u04ff",
    "greek": "\u0370-\u03ff",
    "hebrew": "\u0590-\u05ff",
    "arabic": "\u0600-\u06ff",
    "devanagari": "\u0900-\u097f",
    "thai": "\u0e00-\u0e7f",
    "latin": "A-Za-z\u00c0-\u024f",
}
_COMMON = {
    "English": "the and of is are to in that it for with was on as be this they you from has have",
    "French": "le la les des est et une un dans que qui pour sur avec pas nous il elle au du je",
    "Spanish": "el la los las es y una un en que de para con por no su del como al se son",
    "German": "der die das und ist nicht ein eine mit zu den von auf für im sie wir ich es dem",
    "Italian": "il la gli che è di un una per non con sono del della e le nel si i questo",
    "Portuguese": "o a os as é e um uma que de para com não do da em por no na se são",
    "Dutch": "de het een en is van niet dat op te zijn met voor aan er ook maar die wij",
}


@dataclass(frozen=True)
class Language:
    """A language, its Japanese name and the script it is told by."""

    name: str
    japanese: str
    script: str = "latin"

    def asked(self, prompt: str) -> bool:
        """Whether the prompt asks for an answer in this language."""
        english = (
            rf"\b(?:{_VERBS})\b[^\n]{{0,160}}?\b(?:in|into|to)\s+{self.name}\b{_NOT_AFTER}|"
            rf"^in {self.name}\b\s*[,:]"
        )
        japanese = (
            rf"{self.japanese}(?:で|に)(?:答|書|説明|訳|翻訳|言い換え|表現|返|回答|教え|変換|直|述べ|"
            r"まとめ|要約)"
        )
        short = {"English": "|英訳", "Japanese": "|和訳"}.get(self.name, "")
        return bool(re.search(english, prompt, re.I) or re.search(japanese + short, prompt))


LANGUAGES = (
    Language("Japanese", "日本語", "kana"),
    Language("English", "英語"),
    Language("French", "フランス語"),
    Language("Spanish", "スペイン語"),
    Language("German", "ドイツ語"),
    Language("Italian", "イタリア語"),
    Language("Portuguese", "ポルトガル語"),
    Language("Dutch", "オランダ語"),
    Language("Chinese", "中国語", "han"),
    Language("Korean", "韓国語", "hangul"),
    Language("Russian", "ロシア語", "cyrillic"),
    Language("Greek", "ギリシャ語", "greek"),
    Language("Hebrew", "ヘブライ語", "hebrew"),
    Language("Arabic", "アラビア語", "arabic"),
    Language("Hindi", "ヒンディー語", "devanagari"),
    Language("Thai", "タイ語", "thai"),
)


def mismatch(text: str, wanted: Language) -> str:
    """What is wrong with the language of an answer; "" where it fits or is too short to tell."""
    prose = plain_prose(text)
    scripts = Counter(
        {name: len(re.findall(f"[{span}]", prose)) for name, span in _SCRIPTS.items()}
    )
    total = sum(scripts.values())
    if total < 4:
        return ""
    if wanted.script == "kana":
        fits = scripts["kana"] + scripts["han"] >= 0.4 * total
    elif wanted.script == "han":
        fits = scripts["han"] >= 0.4 * total and scripts["kana"] <= 0.1 * total
    else:
        fits = scripts[wanted.script] >= 0.5 * total
    found = scripts.most_common(1)[0][0]
    if not fits:
        return f"{_script_name(found)} instead of {wanted.name}"
    return _other_latin(prose, wanted) if wanted.script == "latin" else ""


def _script_name(script: str) -> str:
    if script == "kana":
        return "Japanese"
    return {"han": "Chinese or Japanese"}.get(script, f"{script.capitalize()} script")


def _other_latin(prose: str, wanted: Language) -> str:
    """Tells languages of the Latin script by their commonest words."""
    words = re.findall(r"[^\W\d_]+", prose.lower())
    hits = {name: sum(word in common.split() for word in words) for name, common in _COMMON.items()}
    best = max(hits, key=lambda name: hits[name])
    if best != wanted.name and hits[best] >= 3 and hits[best] > 2 * hits[wanted.name]:
        return f"{best} instead of {wanted.name}"
    return ""
