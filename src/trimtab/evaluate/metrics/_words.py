"""Texts as words, in any script: where words are not written apart, each character is one."""

import regex

_OTHERS = r"\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_UNSPACED = rf"\p{{Han}}{_OTHERS}"
_WORD = regex.compile(rf"(?=[{_UNSPACED}])\X|(?:(?![{_UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}])+")
_HAN, _OTHER_UNSPACED = regex.compile(r"\p{Han}"), regex.compile(f"[{_OTHERS}]")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; of one in ASCII, those of the package rouge-score."""
    return _WORD.findall(text.lower())


def spaced(text: str) -> str:
    """The text with blanks around each character of a script that writes words together."""
    return regex.sub(rf"(?=[{_UNSPACED}])\X", r" \g<0> ", text)


def is_chinese(texts: list[str]) -> bool:
    """Whether some have Chinese characters, and none has another script that writes words together."""
    return any(map(_HAN.search, texts)) and not is_unspaced(texts)


def is_unspaced(texts: list[str]) -> bool:
    """Whether some have kana, Thai, Lao, Khmer or Burmese."""
    return any(map(_OTHER_UNSPACED.search, texts))
