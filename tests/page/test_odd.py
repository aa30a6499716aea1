"""The status page against a double of the server: what a real one can't be brought to say on demand.

Any number of volumes, markup in every text, a server that goes away, narrow and wide windows, light
and dark, the keyboard alone.
"""

import json
from datetime import timedelta

import pytest

from fake import Fake, World

MARKUP = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'
SERVING = "document.querySelector('#state').dataset.state == 'serving'"
DRAWN = ("document.querySelectorAll('#block-map rect').length > 0"
         " && document.querySelectorAll('#plot-throughput path.curve').length == 2")


@pytest.fixture
def look(browser):
    """look(world, ...) gives the page and the double behind it."""
    made = []

    def go(world, wait=DRAWN, **how):
        double = Fake(world)
        page = browser.open(double.url, **how)
        made.append((page, double))
        page.wait(wait, "the page is drawn")
        return page, double
    yield go
    for page, double in made:
        page.close()
        double.close()


def state(name):
    return f"document.querySelector('#state').dataset.state == {json.dumps(name)}"


# --- how many volumes ---------------------------------------------------------------------------


def test_no_volumes(look):
    world = World(0)
    page, _ = look(world, wait=SERVING)
    page.wait("!document.querySelector('#volume-nothing').hidden", "it says that there are none")
    assert "fdb-nbd create" in page.text("#volume-nothing")
    assert "Nobody is connected" in page.text("#client-nothing")
    assert not page.complaints


def test_a_thousand_volumes(look):
    """They are shown in pages, found by the filter, and ordered by any column."""
    page, _ = look(World(1000))
    assert "1,000 volumes" in page.text("#volume-count")
    n = page.count("#volume-rows tr")
    assert 5 <= n <= 50
    assert page.texts("#volume-rows .name")[0] == "disk-0000"
    page.run("document.querySelector('#page-after').click()")
    page.wait(f"document.querySelector('#volume-rows .name').innerText == 'disk-{n:04}'", "page 2")
    page.run("{ const f = document.querySelector('#filter'); f.value = '77';"
             " f.dispatchEvent(new Event('input')) }")
    wanted = [f"disk-{i:04}" for i in range(1000) if "77" in f"{i:04}"]
    page.wait("document.querySelector('#volume-rows .name').innerText == 'disk-0077'", "it filters")
    assert page.texts("#volume-rows .name") == wanted[:n]
    sort_by_name = "document.querySelector('#volume-heads button').click()"
    page.run(sort_by_name)
    page.run(sort_by_name)
    page.wait(f"document.querySelector('#volume-rows .name').innerText == '{wanted[-1]}'",
              "the other way round")
    assert not page.complaints


# --- what others chose ----------------------------------------------------------------------------


def test_markup_stays_text(look):
    world = World(2)
    name = MARKUP + "/../%2e?#"
    world.series[name] = world.series[world.volumes[0]["name"]]
    world.volumes[0].update(name=name, description=MARKUP)
    world.volumes[0]["owner"].update(ours=False, host=MARKUP)
    world.clients[0].update(peer=MARKUP + "peer", export=MARKUP, address=MARKUP)
    page, _ = look(world)
    assert page.text("#volume-title") == name
    assert page.texts("#volume-rows .name")[0] == name
    assert page.text("#volume-owner") == MARKUP
    client, export = page.texts("#client-rows td")[:2]
    assert client.count(MARKUP) == 2 and MARKUP in export
    assert page.count("main img") == 0 and page.count("main script") == 0
    assert page.run("window.hit === undefined")
    assert not page.complaints


# --- a server that goes away ---------------------------------------------------------------------


def test_server_goes_away_and_comes_back(look):
    page, double = look(World(3))
    double.gone()
    page.wait(state("away"), "it says that there is no answer")
    assert "No answer from the server since" in page.text("#notice")
    assert page.text("#volume-rows .name") == "disk-0000", "what was known is still shown"
    double.back()
    page.wait(SERVING, "it serves again")
    page.wait("document.querySelector('#notice').innerText.includes('answers again')", "it says so")
    double.gone()
    page.wait(state("away"), "away again")
    double.world.started += timedelta(hours=1)
    double.back()
    page.wait("document.querySelector('#notice').innerText.includes('Another server process')",
              "it says that this is another one")


def test_server_that_hangs(look):
    page, double = look(World(1))
    double.world.silent = True
    page.wait(state("away"), "it says that there is no answer")


def test_what_the_server_says_of_itself(look):
    page, double = look(World(3))
    double.world.reachable = False
    page.wait("document.querySelector('#notice').innerText.includes('store does not answer')",
              "a store that does not answer")
    double.world.reachable = True
    double.world.draining = True
    page.wait(state("draining"), "it drains")
    assert "New clients are refused" in page.text("#notice")


# --- how it looks ----------------------------------------------------------------------------------

# Texts whose contrast to what is behind them is under 4.5 (WCAG AA).
FAINT = """(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = rgb(getComputedStyle(node).backgroundColor);
      if (color.length < 4 || color[3] > .99) return color;
    }
  };
  const out = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !node.checkVisibility() || node.disabled || node.closest('.skip, noscript')) continue;
    const style = getComputedStyle(node);
    const a = light(rgb(node instanceof SVGElement ? style.fill : style.color));
    const b = light(behind(node));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) out.push(`${node.textContent.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return out;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read(look, scheme):
    page, _ = look(World(12), scheme=scheme)
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(v) for v in ground[4:-1].split(","))
    assert (brightness > 600) == (scheme == "light"), ground
    assert page.run(FAINT) == []


def test_nothing_sticks_out_at_any_width(look):
    world = World(12)
    long = "x" * 128
    world.series[long] = world.series["disk-0001"]
    world.volumes[1]["name"] = long
    world.volumes[0]["description"] = "word " * 50 + "y" * 200
    world.clients[0].update(peer="z" * 200,
                            address="[2001:db8:1111:2222:3333:4444:5555:6666]:40000")
    page, _ = look(world)
    for width in (320, 390, 641, 768, 861, 1024, 1200, 1341, 1366, 1440, 1920, 2560):
        page.resize(width, 900)
        page.wait(f"innerWidth == {width}", "it has that width")
        wide = page.run("document.scrollingElement.scrollWidth")
        assert wide <= width, f"{wide} pixels of content in a window of {width}"
        # (A table may not reach into its neighbour either.)
        out = page.run("[...document.querySelectorAll('.card')].filter((c) => [...c.querySelectorAll("
                       "'td, th')].some((t) => t.getBoundingClientRect().width > 1 && "
                       "t.getBoundingClientRect().right > c.getBoundingClientRect().right)).length")
        assert out == 0, f"{out} tables stick out at {width}"


def test_the_keyboard_is_enough(look):
    page, _ = look(World(12))
    page.run("document.querySelector('#plot-throughput svg').focus()")
    for _ in range(3):
        page.key("ArrowLeft")
    page.wait("document.querySelector('#plot-throughput').innerText.includes('3 s ago')",
              "the plot tells of that second")
    reached = []
    for _ in range(40):
        page.key("Tab")
        reached.append(page.run("document.activeElement.innerText || document.activeElement.id"))
        if reached[-1] == "disk-0002":
            break
    assert reached[-1] == "disk-0002", reached
    assert "filter" in reached and "Owner" in reached
    page.key("Enter")
    page.wait("document.querySelector('#volume-title').innerText == 'disk-0002'", "it is chosen")
    assert page.run("location.hash") == "#volume=disk-0002"
    page.run("document.querySelector('#block-map svg').focus()")
    page.key("ArrowRight")
    page.key("ArrowRight")
    page.wait("document.querySelector('#block-readout').innerText.includes('writes')",
              "the map tells of a cell")
    assert page.run("document.querySelectorAll('#block-map .at').length") == 1
    # The choice outlives a reload.
    page.call("Page.reload")
    page.wait("document.querySelector('#volume-title')?.innerText == 'disk-0002'", "still chosen")


def test_everything_that_can_be_used_has_a_name(look):
    page, _ = look(World(12))
    page.call("Accessibility.enable")
    unnamed = []
    for node in page.call("Accessibility.getFullAXTree")["nodes"]:
        focusable = any(p["name"] == "focusable" and p["value"].get("value")
                        for p in node.get("properties", ()))
        role = node.get("role", {}).get("value")
        if focusable and role != "RootWebArea" and not node.get("name", {}).get("value"):
            unnamed.append(node.get("role"))
    assert not unnamed
