"""The built page is that of the sources beside it, and says whose code it contains."""

from __future__ import annotations

import hashlib
import json

import pytest

from verl_ext.viewer.app import STATIC

pytestmark = pytest.mark.unit
WEB = STATIC.parent / "web"


def test_the_built_page_is_up_to_date():
    """After a change: cd verl_ext/viewer/web && npm ci && npm run build."""
    sources = [WEB / "build.mjs", WEB / "package.json", WEB / "package-lock.json", *(WEB / "src").iterdir()]
    now = {str(path.relative_to(WEB)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}
    assert json.loads((STATIC / "sources.json").read_text()) == now


def test_packages_are_pinned_by_version_and_hash_and_their_licences_are_shipped():
    lock = json.loads((WEB / "package-lock.json").read_text())["packages"]
    bundled = {
        name.removeprefix("node_modules/"): entry for name, entry in lock.items() if name and not entry.get("dev")
    }
    wanted = json.loads((WEB / "package.json").read_text())
    assert all(
        version[0].isdigit() for kind in ("dependencies", "devDependencies") for version in wanted[kind].values()
    )
    assert all(entry["integrity"].startswith("sha512-") for entry in bundled.values())
    licences = (STATIC / "LICENSES.txt").read_text()
    for name in wanted["dependencies"]:
        assert f"{name} {bundled[name]['version']} (" in licences


def test_no_part_of_the_page_makes_html_out_of_text():
    script = (STATIC / "app.js").read_text()
    for way in ("outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "DOMParser"):
        assert way not in script
