"""What a page of another site, open in a browser of this machine, can ask of the API: nothing."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest

from tests.system.driver import Machine

EVIL = "http://evil.example"


def asked(machine: Machine, method: str, path: str, body: bytes | None = None, **headers: str) -> dict[str, str]:
    stated = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"{machine.url}/api{path}", body, stated, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return {name.lower(): value for name, value in answer.headers.items()}


def test_a_page_elsewhere_is_not_let_in(machine: Machine) -> None:
    wanted = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        asked(machine, "OPTIONS", "/flows/", Origin=EVIL, **wanted)
    assert refused.value.code == 400 and "access-control-allow-origin" not in {name.lower() for name in refused.value.headers}
    own = asked(machine, "OPTIONS", "/flows/", Origin=f"http://localhost:{machine.port}", **wanted)
    assert own["access-control-allow-origin"] == f"http://localhost:{machine.port}"
    assert "access-control-allow-origin" not in asked(machine, "GET", "/health", Origin=EVIL), "nor can it read an answer"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_what_needs_no_leave_of_the_browser_is_no_command(machine: Machine, kind: str) -> None:
    """A page may send these without asking; the server doesn't take them for JSON."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        asked(machine, "POST", "/flows/", json.dumps({"name": "of-an-evil-page"}).encode(), Origin=EVIL, Content_Type=kind)
    assert refused.value.code in (400, 415, 422)
    assert "of-an-evil-page" not in [flow["name"] for flow in machine.call("/flows/filter", {})]
