"""The status page of a real server under load, in a real browser."""

import json
import urllib.request

import pytest

from harness.load import Background, Load, Shape
from harness.server import SLOW, free_port

MIB = 1 << 20
SHAPE = dict(size=64 * MIB, ops=1 << 30, pace_us=500, hot=0.8, hot_part=8, connections=2,
             lengths=((4096, 4), (65536, 2)))
FILES = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript",
         "icon.svg": "image/svg+xml"}


@pytest.fixture(scope="module")
def site(module_servers):
    """A server with a status page, and its address."""
    port = free_port()
    server = module_servers.start(
        {"v": "64M", "w": "1G"}, ["--http", f"127.0.0.1:{port}", "--control", "off"])
    server.cli("create", "idle", "2G", "--description", '<b>"quoted"</b> & <script>')
    return server, f"http://127.0.0.1:{port}/"


def get(url):
    with urllib.request.urlopen(url, timeout=10 * SLOW) as answer:
        return answer.headers, answer.read()


def test_files_and_what_they_may_do(site):
    _, url = site
    for name, kind in FILES.items():
        headers, body = get(url + name)
        assert headers["Content-Type"].split(";")[0] == kind and body
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and "data:" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
    page = get(url)[1].decode()
    assert "style=" not in page and "<style" not in page and " on" + "click" not in page


@pytest.mark.limit(240)
def test_under_load(site, browser, rng, folder):
    server, url = site
    load = Load(server, "v", Shape(**SHAPE), rng)
    with Background(load, 200 * SLOW) as running:
        page = browser.open(url)
        page.wait("document.querySelector('#state').dataset.state == 'serving'", "it serves")
        page.wait("/MiB|KiB/.test(document.querySelector('#write-rate').innerText)",
                  "the throughput is not zero")
        page.wait("document.querySelector('#clean-text').innerText.includes('iB')", "cache")
        assert page.text("#client-count") == "2"
        assert "2 clients" in page.text("#clients-count") and page.count("#client-rows tr") == 2
        assert page.texts("#client-rows tr td:nth-child(2)") == ["v", "v"]

        # All volumes, in use first; the description is text.
        names = page.texts("#volume-rows .name")
        assert names == ["v", "idle", "w"]
        owners = page.texts("#volume-rows td:nth-child(3)")
        assert owners == ["this server", "nobody", "nobody"]
        assert page.text("#volume-title") == "v"

        # Plots: more than one second of writes, above the ground line; and a number for each.
        for plot in ("#plot-throughput", "#volume-throughput", "#plot-latency", "#volume-latency"):
            page.wait(f"document.querySelector('{plot} path.curve.write')?"
                      ".getAttribute('d').split('L').length > 2", f"{plot} is drawn")
            width, height = page.run(
                f"(b => [b.width, b.height])(document.querySelector('{plot} path.curve.write').getBBox())")
            assert width > 5 and (height > 5 or "latency" in plot), (plot, width, height)
        assert page.run("document.querySelector('#volume-throughput').innerText.includes('iB/s')")

        # The map: the first eighth was written most.
        page.wait("document.querySelectorAll('#block-map rect[class^=heat-]').length > 20", "a map")
        cells = page.run("[...document.querySelectorAll('#block-map rect')].map(r =>"
                         " +(r.getAttribute('class').match(/heat-(\\d)/) || [0, 0])[1])")
        eighth = len(cells) // 8
        assert sum(cells[:eighth]) / eighth > sum(cells[eighth:]) / (len(cells) - eighth) + 0.5

        # What it says is what the server counts.
        now = json.loads(get(url + "v1/volumes/v")[1])
        assert now["write"]["requests"] > 0 and now["clients"] == 2
        for scheme in ("light", "dark"):
            page.scheme(scheme)
            page.screenshot(folder / f"{scheme}.png")
        assert (folder / "light.png").read_bytes() != (folder / "dark.png").read_bytes()
        assert running.running()
    page.run("[...document.querySelectorAll('.name button')].find(b => b.innerText == 'idle').click()")
    page.wait("document.querySelector('#volume-title').innerText == 'idle'", "another one is chosen")
    assert page.text("#volume-owner") == '<b>"quoted"</b> & <script>'
    page.wait("document.querySelector('#block-readout').innerText.startsWith('Nothing')", "no heat")
    load.close()
    page.wait("document.querySelector('#client-count').innerText == '0'", "they have left")
    assert page.complaints == []
    elsewhere = [r for r in page.requests if not r.startswith(url)]
    assert elsewhere == [] and len(page.requests) > 10
    page.close()


def test_a_restart_is_seen(site, browser):
    server, url = site
    page = browser.open(url)
    page.wait("document.querySelector('#state').dataset.state == 'serving'", "it serves")
    server.kill()
    page.wait("document.querySelector('#state').dataset.state == 'away'", "it is away")
    server.start()
    page.wait("document.querySelector('#notice').innerText.includes('Another server process')",
              "it is back, and another one")
    page.wait("document.querySelector('#state').dataset.state == 'serving'", "it serves")
    page.close()
