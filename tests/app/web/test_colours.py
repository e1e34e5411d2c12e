"""Text can be read: WCAG's contrast of 4.5 (AA), in both colour schemes."""

import re

import pytest

from app.web.static_files import FILES

pytestmark = pytest.mark.unit

# The text, and what it stands on.
PAIRS = [
    *((text, ground) for text in ("text", "muted") for ground in ("page", "surface", "sunken")),
    *((tone, f"{tone}-soft") for tone in ("priority", "default", "flex", "good", "bad", "accent")),
    *((tone, ground) for tone in ("accent", "priority", "bad") for ground in ("page", "sunken")),
    ("accent-text", "accent"),
]


def schemes():
    css = FILES["site.css"].body.decode()
    light, dark = css.split("prefers-color-scheme: dark", 1)
    colours = {"light": _colours(light)}
    colours["dark"] = colours["light"] | _colours(dark.split("*, *::before", 1)[0])
    return colours


def _colours(css):
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", css))


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    darker, lighter = sorted([luminance(one), luminance(other)])
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("text", "ground"), PAIRS)
def test_text_stands_out_from_what_it_stands_on(scheme, text, ground):
    colours = schemes()[scheme]
    assert contrast(colours[text], colours[ground]) >= 4.5
