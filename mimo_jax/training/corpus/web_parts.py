"""Building blocks of HTML pages: the frame, the style sheet of the parts in use, and one function for each part."""

from collections.abc import Sequence
from html import escape

_RULES = {
    "nav": "nav a { color: white; margin-right: 1rem; }",
    "table": "table { border-collapse: collapse; width: 100%; }\n"
    "    th, td { border: 1px solid #ddd; padding: 0.5rem; }",
    "cards": ".cards { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1rem; }\n"
    "    .card { border: 1px solid #ddd; border-radius: 8px; padding: 1rem; }",
    "form": "label { display: block; margin-top: 1rem; }\n    input, textarea { width: 100%; padding: 0.5rem; }",
    "button": "button { background: %(color)s; color: white; border: none; padding: 0.5rem 1rem; }",
    "quote": "blockquote { border-left: 4px solid %(color)s; margin: 1rem 0; padding-left: 1rem; }",
}


def page(title: str, heading: str, subtitle: str, color: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole document: head with style, header, one `<section>` for each part, footer.

    Args:
        title: The text of `<title>`.
        heading: The text of `<h1>`, repeated in the footer.
        subtitle: A line below the heading.
        color: The main colour, as CSS writes it.
        sections: Identifier, heading and inner HTML (indented by six blanks) of each part.
    """
    inner = "\n".join(body for _, _, body in sections)
    used = ["nav"] if len(sections) > 1 else []
    used += ["table"] if "<table" in inner else []
    used += ["cards"] if 'class="cards"' in inner else []
    used += ["form"] if "<form" in inner else []
    used += ["button"] if "<button" in inner else []
    used += ["quote"] if "<blockquote" in inner else []
    rules = "\n    ".join(_RULES[name] for name in used).replace("%(color)s", color)
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '  <meta charset="utf-8">',
        f"  <title>{escape(title)}</title>",
        "  <style>",
        "    body { font-family: sans-serif; margin: 0; color: #333; }",
        f"    header {{ background: {color}; color: white; padding: 2rem; }}",
        "    main { max-width: 50rem; margin: auto; padding: 1rem; }",
        *([f"    {rules}"] if rules else []),
        "  </style>",
        "</head>",
        "<body>",
        "  <header>",
        f"    <h1>{escape(heading)}</h1>",
        f"    <p>{escape(subtitle)}</p>",
        *([navigation(sections)] if len(sections) > 1 else []),
        "  </header>",
        "  <main>",
    ]
    for identifier, name, body in sections:
        lines += [f'    <section id="{identifier}">', f"      <h2>{escape(name)}</h2>", body, "    </section>"]
    lines += ["  </main>", "  <footer>", f"    <p>&copy; {escape(heading)}</p>", "  </footer>", "</body>", "</html>"]
    return "\n".join(lines)


def navigation(sections: Sequence[tuple[str, str, str]]) -> str:
    """Links to the parts of a page."""
    links = [f'      <a href="#{identifier}">{escape(name)}</a>' for identifier, name, _ in sections]
    return "\n".join(["    <nav>", *links, "    </nav>"])


def paragraph(text: str) -> str:
    """A paragraph."""
    return f"      <p>{escape(text)}</p>"


def bullets(items: Sequence[str], tag: str = "ul") -> str:
    """A list; numbered with the tag `ol`."""
    return "\n".join([f"      <{tag}>", *(f"        <li>{escape(item)}</li>" for item in items), f"      </{tag}>"])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a row of headings."""
    lines = ["      <table>", "        <tr>" + "".join(f"<th>{escape(c)}</th>" for c in columns) + "</tr>"]
    lines += ["        <tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "      </table>"])


def cards(entries: Sequence[tuple[str, str]]) -> str:
    """Cards side by side: a heading and a line each."""
    lines = ['      <div class="cards">']
    for name, text in entries:
        lines += ['        <div class="card">', f"          <h3>{escape(name)}</h3>"]
        lines += [f"          <p>{escape(text)}</p>", "        </div>"]
    return "\n".join([*lines, "      </div>"])


def form(fields: Sequence[str], button: str) -> str:
    """A form with a labelled input for each field, and a button to send it."""
    lines = ['      <form action="/send" method="post">']
    for field in fields:
        key = field.lower().replace(" ", "-")
        lines.append(f'        <label for="{key}">{escape(field)}</label>')
        if key in ("message", "comment"):
            lines.append(f'        <textarea id="{key}" name="{key}" rows="4"></textarea>')
        else:
            kind = {"email": "email", "phone": "tel", "password": "password", "date": "date"}.get(
                key.split("-")[-1], "text"
            )
            lines.append(f'        <input type="{kind}" id="{key}" name="{key}" required>')
    return "\n".join([*lines, f'        <button type="submit">{escape(button)}</button>', "      </form>"])


def quotes(entries: Sequence[tuple[str, str]]) -> str:
    """What people said, and who."""
    return "\n".join(f"      <blockquote>{escape(text)} - {escape(name)}</blockquote>" for text, name in entries)


def questions(entries: Sequence[tuple[str, str]]) -> str:
    """Questions that open to show their answers."""
    lines = []
    for question, answer in entries:
        lines += ["      <details>", f"        <summary>{escape(question)}</summary>"]
        lines += [f"        <p>{escape(answer)}</p>", "      </details>"]
    return "\n".join(lines)
