"""The plain text of a mail that has only HTML."""

import re
from html.parser import HTMLParser

_SILENT = {"head", "style", "script", "title", "template"}
_BLOCKS = set(
    "address article blockquote div dl dd dt fieldset footer form h1 h2 h3 h4 h5 h6 header hr main"
    " ol p pre section table tr ul".split()
)


def html_to_text(html: str) -> str:
    """Return what a person reads in ``html``: paragraphs apart, lists with hyphens, links with their address."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    lines = [" ".join(line.split()) for line in "".join(reader.parts).splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent = 0
        self.links: list[tuple[str, int]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in _SILENT:
            self.silent += 1
        elif tag == "br":
            self.parts.append("\n")
        elif tag == "li":
            self.parts.append("\n- ")
        elif tag in _BLOCKS:
            self.parts.append("\n\n")
        elif tag == "img":
            self.parts.append(given.get("alt") or "")
        elif tag == "a":
            self.links.append((given.get("href") or "", len(self.parts)))

    def handle_endtag(self, tag: str) -> None:
        if tag in _SILENT:
            self.silent = max(0, self.silent - 1)
        elif tag in _BLOCKS:
            self.parts.append("\n\n")
        elif tag == "td":
            self.parts.append(" ")
        elif tag == "a" and self.links:
            href, start = self.links.pop()
            if href.startswith(("http://", "https://")) and href not in "".join(self.parts[start:]):
                self.parts.append(f" ({href})")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            # Line ends in the source mean nothing; those that do were put in above.
            self.parts.append(re.sub(r"\s+", " ", data))
