/*
 * The status page: asks the server for its JSON (docs/http.md) once a second and draws it.
 *
 * What others chose (names, descriptions, addresses) only ever becomes the text of a node, never
 * markup. Nothing is asked of anybody but the server that the page came from.
 */
'use strict';

const POLL_MS = 1000;
const TIMEOUT_MS = 4000;
const ROWS_PER_PAGE = 15;
const ROWS_PER_PAGE_NARROW = 8;
const CLIENT_ROWS = 200;
const SPARK_SECONDS = 60;
const SORT_AGAIN_MS = 5000;
const NEWS_MS = 10000;
const SVG = 'http://www.w3.org/2000/svg';

const id = (name) => document.getElementById(name);

/* --- nodes ---------------------------------------------------------------------------- */

/* An element with attributes and children (nodes or text). */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function svg(tag, attributes = {}, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    node.setAttribute(name, value);
  }
  if (text !== undefined) {
    node.textContent = text;
  }
  return node;
}

/* (An unchanged text is left alone: it may be selected, or be read out to somebody.) */
function say(node, text) {
  if (node.textContent !== text) {
    node.textContent = text;
  }
}

/* --- numbers -------------------------------------------------------------------------- */

const BYTE_UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];

function threeDigits(value) {
  if (value >= 99.95 || Number.isInteger(value)) {
    return String(Math.round(value));
  }
  return value.toFixed(value >= 9.995 ? 1 : 2);
}

function bytes(value) {
  if (value === null || value === undefined) {
    return '–';
  }
  let unit = 0;
  while (value >= 1023.5 && unit < BYTE_UNITS.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${threeDigits(value)} ${BYTE_UNITS[unit]}`;
}

const byteRate = (value) => (value === null || value === undefined ? '–' : `${bytes(value)}/s`);

function duration(us) {
  if (us === null || us === undefined) {
    return '–';
  }
  if (us < 999.5) {
    return `${threeDigits(us)} µs`;
  }
  return us < 999500 ? `${threeDigits(us / 1000)} ms` : `${threeDigits(us / 1e6)} s`;
}

function span(seconds) {
  const parts = [[86400, 'd'], [3600, 'h'], [60, 'min'], [1, 's']];
  const first = parts.findIndex(([length]) => seconds >= length);
  if (first < 0) {
    return '0 s';
  }
  const [length, name] = parts[first];
  const whole = `${Math.floor(seconds / length)} ${name}`;
  const [next, nextName] = parts[first + 1] || [];
  const rest = next ? Math.floor((seconds % length) / next) : 0;
  return rest && first < 2 ? `${whole} ${rest} ${nextName}` : whole;
}

const whole = (n) => Math.round(n).toLocaleString('en');
const count = (n, one) => `${whole(n)} ${one}${n === 1 ? '' : 's'}`;
const perSecond = (n) => `${n < 10 ? threeDigits(n) : whole(n)}/s`;

/* Of the last whole second, or null. */
const rate = (thing, name) => (thing && thing.rates && thing.rates[name] !== undefined
  ? thing.rates[name] : null);

/* --- plots ---------------------------------------------------------------------------- */

const LEAST_BYTES = 4096; /* the scale of a plot of nothing */
const PLOT = {left: 66, right: 6, top: 8, bottom: 22, seconds: 120};

/* The lines of a linear scale of bytes that begins at 0, about four of them. */
function linearTicks(max) {
  const unit = 1024 ** Math.max(0, Math.floor(Math.log(Math.max(max, 1)) / Math.log(1024)));
  const steps = [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 512].map((n) => n * unit);
  const small = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512].map((n) => n * unit / 1024);
  const step = [...small, ...steps].find((s) => max / s <= 4) || 512 * unit;
  const n = Math.max(2, Math.ceil(max / step));
  return Array.from({length: n + 1}, (_, i) => i * step);
}

function logTicks(values) {
  const low = values.length ? Math.min(...values) : 10;
  const high = values.length ? Math.max(...values) : 1000;
  let from = Math.floor(Math.log10(Math.max(low, 1)));
  const to = Math.max(Math.ceil(Math.log10(Math.max(high, 1))), from + 2);
  from = Math.min(from, to - 2);
  return Array.from({length: to - from + 1}, (_, i) => 10 ** (from + i));
}

class Plot {
  /* lines: [{key, label, kind}], where kind is a class, and the last one drawn is on top. */
  constructor(figure, title, lines, {format, log = false}) {
    Object.assign(this, {title, lines, format, log, series: null, at: null});
    this.list = el('ul', {class: 'series'});
    for (const line of lines) {
      line.value = el('b', {}, '–');
      this.list.prepend(el('li', {}, el('span', {class: `swatch ${line.kind}`}), line.label, line.value));
    }
    this.when = el('span', {class: 'count', hidden: ''});
    this.canvas = svg('svg', {role: 'img', tabindex: '0'});
    figure.append(
      el('figcaption', {class: 'plot-head'}, el('span', {class: 'plot-title'}, title), this.when, this.list),
      el('div', {class: 'plot'}, this.canvas));
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  listen() {
    this.canvas.addEventListener('pointermove', (event) => {
      const box = this.canvas.getBoundingClientRect();
      this.look(this.place(event.clientX - box.left));
    });
    this.canvas.addEventListener('pointerleave', () => this.look(null));
    this.canvas.addEventListener('blur', () => this.look(null));
    this.canvas.addEventListener('keydown', (event) => {
      const move = {ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10}[event.key];
      if (move) {
        this.look((this.at === null ? this.length() - 1 : this.at) + move);
        event.preventDefault();
      } else if (event.key === 'Escape') {
        this.look(null);
      }
    });
  }

  length() {
    return this.series ? this.series[this.lines[0].key].length : 0;
  }

  /* The second that is `x` pixels from the left. */
  place(x) {
    const step = (this.width - PLOT.left - PLOT.right) / (PLOT.seconds - 1);
    return this.length() - 1 - Math.round((this.width - PLOT.right - x) / step);
  }

  look(at) {
    const n = this.length();
    this.at = at === null || !n ? null : Math.min(Math.max(at, 0), n - 1);
    this.draw();
  }

  show(series) {
    this.series = series;
    this.draw();
  }

  /* The curve of one line, and the area below it, as paths; interrupted where nothing was asked. */
  paths(values, x, y, floor) {
    let curve = '';
    let area = '';
    let begun = null;
    values.forEach((value, i) => {
      if (value === null) {
        return;
      }
      const here = `${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
      const first = i === 0 || values[i - 1] === null;
      const last = i === values.length - 1 || values[i + 1] === null;
      if (first) {
        begun = x(i).toFixed(1);
        area += `M${begun} ${floor}`;
      }
      curve += first ? `M${here}` : `L${here}`;
      area += `L${here}`;
      if (last) {
        curve += first ? 'h.01' : '';
        area += `L${x(i).toFixed(1)} ${floor}Z`;
      }
    });
    return {curve, area};
  }

  draw() {
    const box = this.canvas.getBoundingClientRect();
    if (!box.width || !this.series) {
      return;
    }
    this.width = box.width;
    const right = box.width - PLOT.right;
    const floor = box.height - PLOT.bottom;
    const n = this.length();
    const all = this.lines.flatMap((line) => this.series[line.key].filter((v) => v !== null));
    const asked = all.some((v) => v > 0);
    const ticks = this.log ? logTicks(all.filter((v) => v > 0)) : linearTicks(Math.max(LEAST_BYTES, ...all));
    const top = ticks[ticks.length - 1];
    const high = floor - PLOT.top;
    const share = this.log
      ? (v) => Math.log(Math.max(v, ticks[0]) / ticks[0]) / Math.log(top / ticks[0])
      : (v) => v / top;
    const x = (i) => right - (n - 1 - i) * (right - PLOT.left) / (PLOT.seconds - 1);
    const y = (v) => floor - share(v) * high;

    const parts = [];
    for (const tick of ticks) {
      const at = Math.round(y(tick)) + .5;
      parts.push(svg('line', {class: 'rule', x1: PLOT.left, x2: right, y1: at, y2: at}));
      parts.push(svg('text', {x: PLOT.left - 9, y: at + 4, 'text-anchor': 'end'}, this.format(tick)));
    }
    const narrow = box.width < 420;
    for (const seconds of narrow ? [0, 60, 120] : [0, 30, 60, 90, 120]) {
      const at = right - seconds * (right - PLOT.left) / PLOT.seconds;
      const anchor = seconds === 0 ? 'end' : seconds === 120 ? 'start' : 'middle';
      parts.push(svg('text', {x: at, y: box.height - 4, 'text-anchor': anchor},
        seconds ? `${seconds} s ago` : 'now'));
    }
    for (const line of this.lines) {
      const {curve, area} = this.paths(this.series[line.key], x, y, floor);
      if (!this.log && asked) {
        parts.push(svg('path', {class: `area ${line.kind}`, d: area}));
      }
      parts.push(svg('path', {class: `curve ${line.kind}`, d: curve}));
    }
    if (!asked) {
      parts.push(svg('text', {x: (PLOT.left + right) / 2, y: PLOT.top + high / 4 + 4, 'text-anchor': 'middle'},
        'Nothing was asked in the last two minutes'));
    }
    if (this.at !== null) {
      const at = Math.round(x(this.at)) + .5;
      parts.push(svg('line', {class: 'cursor', x1: at, x2: at, y1: PLOT.top, y2: floor}));
    }
    this.canvas.setAttribute('viewBox', `0 0 ${box.width} ${box.height}`);
    this.canvas.replaceChildren(...parts);
    this.tell(n);
  }

  tell(n) {
    const at = this.at === null ? n - 1 : this.at;
    const spoken = [];
    for (const line of this.lines) {
      const values = this.series[line.key];
      say(line.value, this.format(at >= 0 ? values[at] : null));
      spoken.push(`${line.label} ${line.value.textContent}`);
    }
    this.when.hidden = at === n - 1;
    say(this.when, `${n - 1 - at} s ago`);
    this.canvas.setAttribute('aria-label', `${this.title}: ${spoken.join(', ')}`);
  }
}

function throughputPlot(figure) {
  return new Plot(figure, 'Throughput', [
    {key: 'write_bytes', label: 'Write', kind: 'write'},
    {key: 'read_bytes', label: 'Read', kind: 'read'},
  ], {format: byteRate});
}

function latencyPlot(figure) {
  return new Plot(figure, 'Latency', [
    {key: 'write_p99_us', label: 'p99', kind: 'write'},
    {key: 'write_p50_us', label: 'Write p50', kind: 'write thin'},
    {key: 'read_p99_us', label: 'p99', kind: 'read'},
    {key: 'read_p50_us', label: 'Read p50', kind: 'read thin'},
  ], {format: duration, log: true});
}

/* --- tables ---------------------------------------------------------------------------- */

const classOf = (column) => [column.kind, column.number && 'number'].filter(Boolean).join(' ');

/*
 * A table whose rows stay the same nodes from one answer to the next, so that the keyboard's place
 * and a selection survive. columns: [{title, number, value (for the order), fill(cell, thing)}].
 */
class Table {
  constructor(heads, rows, columns, key) {
    Object.assign(this, {heads, body: rows, columns, key, rows: new Map(), order: null, down: false});
    for (const column of columns) {
      column.head = el('th', {scope: 'col', class: classOf(column)});
      if (column.value) {
        const button = el('button', {type: 'button'}, column.title);
        button.addEventListener('click', () => this.sort(column));
        column.head.append(button);
      } else {
        column.head.append(column.title);
      }
      heads.append(column.head);
    }
  }

  sort(column) {
    this.down = this.order === column ? !this.down : Boolean(column.number);
    this.order = column;
    for (const c of this.columns) {
      c.head.removeAttribute('aria-sort');
    }
    column.head.setAttribute('aria-sort', this.down ? 'descending' : 'ascending');
    if (this.sorted) {
      this.sorted();
    }
  }

  /* Things in the order that was asked for, else as they came. */
  ordered(things) {
    if (!this.order) {
      return things;
    }
    const {value} = this.order;
    const sign = this.down ? -1 : 1;
    return [...things].sort((a, b) => {
      const x = value(a);
      const y = value(b);
      return sign * (x < y ? -1 : x > y ? 1 : 0);
    });
  }

  row(thing) {
    const cells = this.columns.map((column) => el('td',
      {'data-label': column.title, class: classOf(column)}));
    const node = el('tr', {}, ...cells);
    const row = {node, cells, thing};
    this.columns.forEach((column, i) => column.begin && column.begin(cells[i], row));
    if (this.begin) {
      this.begin(row);
    }
    return row;
  }

  show(things) {
    const rows = new Map();
    for (const thing of things) {
      const name = this.key(thing);
      const row = this.rows.get(name) || this.row(thing);
      row.thing = thing;
      this.columns.forEach((column, i) => column.fill(row.cells[i], thing));
      rows.set(name, row);
    }
    this.rows = rows;
    const nodes = [...rows.values()].map((row) => row.node);
    if (nodes.length !== this.body.children.length || nodes.some((n, i) => n !== this.body.children[i])) {
      const focused = document.activeElement;
      this.body.replaceChildren(...nodes);
      if (focused && focused !== document.activeElement && this.body.contains(focused)) {
        focused.focus({preventScroll: true});
      }
    }
  }
}

function figure(cell, text, quiet) {
  say(cell, text);
  cell.classList.toggle('zero', quiet);
}

/* --- the volumes ------------------------------------------------------------------------ */

const ownerText = (owner) => (!owner ? 'nobody' : owner.ours ? 'this server' : `${owner.host}:${owner.pid}`);

function usedCell(cell, volume) {
  if (!cell.firstChild) {
    cell.append(el('span', {class: 'used-text'}), el('span', {class: 'used'}, el('span')));
  }
  say(cell.firstChild, `${bytes(volume.used_bytes)} of ${bytes(volume.size_bytes)}`);
  cell.lastChild.firstChild.style.width = `${100 * Math.min(1, (volume.used_bytes || 0) / volume.size_bytes)}%`;
}

/* (What other servers do with their volumes is not known here.) */
function rateCell(cell, volume, name) {
  figure(cell, volume.open ? byteRate(rate(volume, name)) : '–', !rate(volume, name));
}

/* Read and write of the last minute, in one small picture. */
function sparkCell(cell, volume) {
  const history = view.history.get(volume.name);
  if (!cell.firstChild) {
    cell.append(svg('svg', {class: 'spark', viewBox: '0 0 96 24', 'aria-hidden': 'true'}));
    cell.firstChild.append(svg('path', {class: 'write'}), svg('path'));
  }
  const top = history ? Math.max(1, ...history.read, ...history.write) : 1;
  const path = (values) => values.map((v, i) => {
    const x = 95 - (values.length - 1 - i) * 94 / (SPARK_SECONDS - 1);
    return `${i ? 'L' : 'M'}${x.toFixed(1)} ${(22 - 20 * v / top).toFixed(1)}`;
  }).join('');
  const [write, read] = cell.firstChild.children;
  write.setAttribute('d', history && history.write.some((v) => v > 0) ? path(history.write) : '');
  read.setAttribute('d', history && history.read.some((v) => v > 0) ? path(history.read) : '');
}

function nameCell(cell, row) {
  const button = el('button', {type: 'button'});
  button.addEventListener('click', (event) => {
    event.stopPropagation();
    choose(row.thing.name, true);
  });
  cell.append(button);
}

const volumeTable = new Table(id('volume-heads'), id('volume-rows'), [
  {title: 'Volume', kind: 'name', value: (v) => v.name, begin: nameCell,
    fill: (cell, v) => {
      say(cell.firstChild, v.name);
      cell.firstChild.title = v.name;
      cell.firstChild.setAttribute('aria-pressed', String(v.name === view.chosen));
    }},
  {title: 'Used', kind: 'whole', value: (v) => v.used_bytes || 0, fill: usedCell},
  {title: 'Owner', kind: 'words', value: (v) => ownerText(v.owner),
    fill: (cell, v) => figure(cell, ownerText(v.owner), !v.owner)},
  {title: 'Clients', number: true, value: (v) => v.clients,
    fill: (cell, v) => figure(cell, v.open ? String(v.clients) : '–', !v.clients)},
  {title: 'Read', number: true, value: (v) => rate(v, 'read_bytes') || 0,
    fill: (cell, v) => rateCell(cell, v, 'read_bytes')},
  {title: 'Write', number: true, value: (v) => rate(v, 'write_bytes') || 0,
    fill: (cell, v) => rateCell(cell, v, 'write_bytes')},
  {title: 'Last minute', kind: 'trend', fill: sparkCell},
], (volume) => volume.name);

volumeTable.begin = (row) => row.node.addEventListener('click', () => choose(row.thing.name, true));
volumeTable.sorted = () => {
  view.page = 0;
  view.orderedAt = 0;
  showVolumes();
};

const clientTable = new Table(id('client-heads'), id('client-rows'), [
  {title: 'Client', kind: 'name', value: (c) => c.address,
    fill: (cell, c) => {
      if (!cell.firstChild) {
        cell.append(el('div', {}, el('span', {class: 'address'}), el('span', {class: 'who'})));
      }
      const [address, who] = cell.firstChild.children;
      say(address, c.address);
      say(who, c.peer && !c.address.includes(c.peer) ? c.peer : '');
    }},
  {title: 'Volume', kind: 'whole', value: (c) => c.export || '',
    fill: (cell, c) => {
      if (!cell.firstChild) {
        cell.append(el('span', {}, el('span'), ' ', el('span', {class: 'tag'}, 'read-only')));
      }
      const [name, tag] = cell.firstChild.children;
      figure(name, c.export || 'not chosen yet', !c.export);
      tag.hidden = !c.read_only;
    }},
  {title: 'Connected', number: true, value: (c) => -Date.parse(c.since),
    fill: (cell, c) => say(cell, span(Math.max(0, (view.now - Date.parse(c.since)) / 1000)))},
  {title: 'Requests', kind: 'extra', number: true, value: (c) => c.requests,
    fill: (cell, c) => figure(cell, whole(c.requests), !c.requests)},
  {title: 'Read', number: true, value: (c) => c.read_bytes,
    fill: (cell, c) => figure(cell, bytes(c.read_bytes), !c.read_bytes)},
  {title: 'Written', number: true, value: (c) => c.written_bytes,
    fill: (cell, c) => figure(cell, bytes(c.written_bytes), !c.written_bytes)},
  {title: 'Under way', number: true, value: (c) => c.in_flight,
    fill: (cell, c) => figure(cell, String(c.in_flight), !c.in_flight)},
  {title: 'Errors', number: true, value: (c) => c.errors,
    fill: (cell, c) => figure(cell, String(c.errors), !c.errors)},
], (client) => client.id);

clientTable.sorted = () => showClients();

/* --- the map of blocks ------------------------------------------------------------------- */

const LEVELS = 6;
const MODES = [['both', 'Both'], ['reads', 'Reads'], ['writes', 'Writes']];

class BlockMap {
  constructor() {
    this.mode = 'both';
    this.at = null;
    this.heat = null;
    this.cells = [];
    this.canvas = svg('svg', {role: 'img', tabindex: '0', 'aria-describedby': 'block-readout'});
    id('block-map').append(this.canvas);
    for (const [mode, text] of MODES) {
      const input = el('input', {type: 'radio', name: 'blocks', value: mode});
      const label = el('label', {}, input, text);
      input.checked = mode === this.mode;
      label.classList.toggle('on', input.checked);
      input.addEventListener('change', () => {
        this.mode = mode;
        for (const other of id('block-modes').children) {
          other.classList.toggle('on', other === label);
        }
        this.draw();
      });
      id('block-modes').append(label);
    }
    this.canvas.addEventListener('pointermove', (event) => {
      const at = this.cells.indexOf(event.target);
      this.look(at < 0 ? null : at);
    });
    this.canvas.addEventListener('pointerleave', () => this.look(null));
    this.canvas.addEventListener('blur', () => this.look(null));
    this.canvas.addEventListener('keydown', (event) => {
      const move = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns}[event.key];
      if (move && this.cells.length) {
        const at = this.at === null ? 0 : this.at + move;
        if (at >= 0 && at < this.cells.length) {
          this.look(at);
        }
        event.preventDefault();
      } else if (event.key === 'Escape') {
        this.look(null);
      }
    });
    new ResizeObserver(() => this.draw()).observe(id('block-map'));
  }

  look(at) {
    if (at === this.at) {
      return;
    }
    this.at = at;
    this.draw();
  }

  show(heat) {
    this.heat = heat;
    if (heat && this.at !== null && this.at >= heat.reads.length) {
      this.at = null;
    }
    this.draw();
  }

  /* Lays the cells out anew where their number or the room for them has changed. */
  lay(n, columns) {
    if (n === this.cells.length && columns === this.columns) {
      return;
    }
    const pitch = 16;
    this.columns = columns;
    this.canvas.setAttribute('viewBox', `-1 -1 ${columns * pitch} ${Math.ceil(n / columns) * pitch}`);
    this.cells = Array.from({length: n}, (_, i) => svg('rect', {
      x: (i % columns) * pitch, y: Math.floor(i / columns) * pitch, width: 14, height: 14, rx: 2.5}));
    this.canvas.replaceChildren(...this.cells);
  }

  /* How much of which kind a cell shows: [amount, 'stored' (blue) or 'heat' (orange)]. */
  amount(i) {
    const {reads, writes} = this.heat;
    if (this.mode === 'reads') {
      return [reads[i], 'stored'];
    }
    if (this.mode === 'writes') {
      return [writes[i], 'heat'];
    }
    return [reads[i] + writes[i], writes[i] > reads[i] ? 'heat' : 'stored'];
  }

  draw() {
    if (!this.heat) {
      return;
    }
    const n = this.heat.reads.length;
    const width = id('block-map').getBoundingClientRect().width;
    this.lay(n, Math.min(n, width < 420 ? 16 : 32));
    const amounts = this.heat.reads.map((_, i) => this.amount(i));
    const most = Math.max(...amounts.map(([amount]) => amount));
    this.cells.forEach((cell, i) => {
      const [amount, kind] = amounts[i];
      /* Each level is a third of the one above it. */
      const level = amount < .5 ? 0
        : Math.max(1, Math.min(LEVELS, LEVELS - Math.floor(Math.log(most / amount) / Math.log(3))));
      cell.setAttribute('class', `${level ? `${kind}-${level}` : 'cold'}${i === this.at ? ' at' : ''}`);
    });
    this.tell(most);
  }

  range(i) {
    const {cell_bytes: length, size_bytes: size} = this.heat;
    return `${bytes(i * length)} – ${bytes(Math.min(size, (i + 1) * length))}`;
  }

  tell(most) {
    const {reads, writes, half_life_s: half} = this.heat;
    const frequency = (n) => perSecond(n * Math.LN2 / half);
    /* Where it is worth a look: one place with several times the usual. */
    const hottest = (counts, done) => {
      const top = Math.max(...counts);
      const mean = counts.reduce((sum, n) => sum + n, 0) / counts.length;
      return top < .5 ? '' : top < 3 * mean ? `Evenly ${done}.` : `Most ${done}: ${this.range(counts.indexOf(top))}.`;
    };
    let text;
    if (this.at !== null) {
      text = `${this.range(this.at)}: ${frequency(reads[this.at])} reads, ${frequency(writes[this.at])} writes`;
    } else if (most < .5) {
      text = 'Nothing was read or written here lately.';
    } else {
      text = `${hottest(reads, 'read')} ${hottest(writes, 'written')}`.trim();
    }
    say(id('block-readout'), text);
    this.canvas.setAttribute('aria-label',
      `Map of the volume in ${count(this.cells.length, 'cell')} of ${bytes(this.heat.cell_bytes)}`);
    this.legend();
  }

  legend() {
    if (this.legendOf === this.mode) {
      return;
    }
    this.legendOf = this.mode;
    const ramp = (kind) => Array.from({length: LEVELS}, (_, i) => el('i', {class: `${kind}-${i + 1}`}));
    const parts = [el('i'), el('span', {}, 'idle')];
    if (this.mode !== 'writes') {
      parts.push(...ramp('stored'), el('span', {}, this.mode === 'both' ? 'mostly read' : 'read'));
    }
    if (this.mode !== 'reads') {
      parts.push(...ramp('heat'), el('span', {}, this.mode === 'both' ? 'mostly written' : 'written'));
    }
    id('block-legend').replaceChildren(...parts);
  }
}

/* --- what is shown ------------------------------------------------------------------------ */

const view = {
  server: null,
  volumes: null,
  clients: null,
  now: 0,             /* the server's clock, ms */
  chosen: null,
  page: 0,
  order: [],          /* names, as they were ordered last */
  orderedAt: 0,
  history: new Map(), /* name -> {read: [], write: []}, of the last minute */
  seeded: false,
  answeredAt: null,
  away: false,
  news: '',
  newsUntil: 0,
};

const plots = {
  throughput: throughputPlot(id('plot-throughput')),
  latency: latencyPlot(id('plot-latency')),
  volumeThroughput: throughputPlot(id('volume-throughput')),
  volumeLatency: latencyPlot(id('volume-latency')),
};
const blockMap = new BlockMap();

/* Terms and what they are; [[term, text]]. */
function showFacts(list, facts) {
  const shown = facts.filter(([, text]) => text !== null && text !== undefined && text !== '');
  if (list.children.length !== shown.length) {
    list.replaceChildren(...shown.map(() => el('div', {}, el('dt'), el('dd'))));
  }
  shown.forEach(([term, text], i) => {
    say(list.children[i].firstChild, term);
    say(list.children[i].lastChild, text);
  });
}

function stateOf(server) {
  if (view.away) {
    return ['away', 'No answer'];
  }
  if (!server) {
    return ['waiting', 'Connecting'];
  }
  if (server.stopping) {
    return ['stopping', 'Stopping'];
  }
  if (server.draining) {
    const over = !server.connections && !server.volumes_open && !server.volumes_owned;
    return over ? ['drained', 'Drained'] : ['draining', 'Draining'];
  }
  return server.ready ? ['serving', 'Serving'] : ['draining', 'Not ready'];
}

function noticeOf(server) {
  if (view.away) {
    return view.answeredAt
      ? `No answer from the server since ${view.answeredAt.toLocaleTimeString()}. What is shown is from then; asking again every second.`
      : 'No answer from the server yet; asking again every second.';
  }
  if (server.store && !server.store.reachable) {
    return 'The store does not answer: requests of clients wait.';
  }
  if (server.draining) {
    return 'This server was told to give its volumes back. New clients are refused; it serves again after a restart.';
  }
  return Date.now() < view.newsUntil ? view.news : '';
}

function showState() {
  const [state, text] = stateOf(view.server);
  id('state').dataset.state = state;
  say(id('state-text'), text);
  document.body.classList.toggle('is-old', view.away);
  const notice = view.server || view.away ? noticeOf(view.server) : '';
  say(id('notice'), notice);
  id('notice').hidden = !notice;
}

function showServer(server) {
  document.title = `${server.host} – fdb-nbd`;
  showFacts(id('server-facts'), [
    ['Host', `${server.host}, process ${server.pid}`],
    ['Store', server.store && server.store.uri],
    ['Addresses', (server.listen || []).join(', ')],
    ['Up for', span(server.uptime_s)],
    ['Version', server.version],
  ]);
  say(id('read-rate'), byteRate(rate(server, 'read_bytes')));
  say(id('write-rate'), byteRate(rate(server, 'write_bytes')));
  for (const kind of ['read', 'write']) {
    const p99 = rate(server, `${kind}_p99_us`);
    say(id(`${kind}-requests`), `${whole(rate(server, `${kind}_requests`) || 0)} requests/s`);
    say(id(`${kind}-latency`), p99 === null ? 'idle' : `99 of 100 in ${duration(p99)}`);
  }
  say(id('client-count'), whole(server.connections));
  say(id('open-count'), `${count(server.volumes_open, 'volume')} open`);
  say(id('owned-count'), `${whole(server.volumes_owned)} owned here`);

  const {limit_bytes: limit, used_bytes: used, dirty_bytes: dirty} = server.cache;
  const clean = Math.max(0, used - dirty);
  say(id('cache-used'), bytes(used));
  say(id('cache-max'), `of ${bytes(limit)}`);
  id('cache-clean').style.width = `${100 * clean / limit}%`;
  id('cache-dirty').style.width = `${100 * dirty / limit}%`;
  say(id('clean-text'), `${bytes(clean)} clean`);
  say(id('dirty-text'), `${bytes(dirty)} dirty`);
  id('cache-meter').setAttribute('aria-label', `Cache: ${bytes(used)} of ${bytes(limit)}, ${bytes(dirty)} of it dirty`);

  const store = server.store || {};
  say(id('store-used'), bytes(store.used_bytes));
  const left = store.available_bytes;
  const isKnown = left !== null && left !== undefined && store.used_bytes !== null;
  id('store-part').style.width = isKnown ? `${100 * store.used_bytes / Math.max(1, store.used_bytes + left)}%` : '0';
  say(id('store-beside'), isKnown ? `${bytes(left)} left` : 'how much is left is not known');
  id('store-meter').setAttribute('aria-label', `Store: ${bytes(store.used_bytes)} used, ${id('store-beside').textContent}`);
  plots.throughput.show(server.series);
  plots.latency.show(server.series);
}

/* The names that match the filter, in order; the order of figures that change all the time is kept
 * for some seconds, so that rows can be read and hit. */
function orderedVolumes() {
  const wanted = id('filter').value.trim().toLowerCase();
  const all = view.volumes.volumes.filter((v) => !wanted || v.name.toLowerCase().includes(wanted)
    || (v.description || '').toLowerCase().includes(wanted));
  const now = Date.now();
  if (now - view.orderedAt >= SORT_AGAIN_MS) {
    view.orderedAt = now;
    view.order = new Map(volumeTable.ordered(view.volumes.volumes).map((v, i) => [v.name, i]));
  }
  const place = (v) => (view.order.has(v.name) ? view.order.get(v.name) : view.order.size);
  return all.sort((a, b) => place(a) - place(b));
}

function showVolumes() {
  const {volumes, total, truncated} = view.volumes;
  const shown = orderedVolumes();
  const perPage = matchMedia('(max-width: 780px)').matches ? ROWS_PER_PAGE_NARROW : ROWS_PER_PAGE;
  const pages = Math.max(1, Math.ceil(shown.length / perPage));
  view.page = Math.min(view.page, pages - 1);
  const first = view.page * perPage;
  const inUse = volumes.filter((v) => v.owner).length;
  say(id('volume-count'), total === 0 ? ''
    : `${count(total, 'volume')}, ${whole(inUse)} in use${truncated ? `; ${whole(volumes.length)} of them here` : ''}`);
  const page = shown.slice(first, first + perPage);
  volumeTable.show(page);
  for (const row of volumeTable.rows.values()) {
    row.node.classList.toggle('chosen', row.thing.name === view.chosen);
  }
  id('volume-heads').parentNode.hidden = !page.length;
  id('volume-nothing').hidden = page.length > 0;
  say(id('volume-nothing'), total === 0 ? 'No volumes yet. Make one: fdb-nbd create NAME SIZE'
    : 'No volume has that in its name or description.');
  id('pager').hidden = pages === 1;
  say(id('page-text'), `${first + 1} – ${first + page.length} of ${whole(shown.length)}`);
  id('page-before').disabled = view.page === 0;
  id('page-after').disabled = view.page === pages - 1;
}

function showClients() {
  const {clients, total} = view.clients;
  clientTable.show(clientTable.ordered(clients).slice(0, CLIENT_ROWS));
  id('client-heads').parentNode.hidden = !clients.length;
  id('client-nothing').hidden = clients.length > 0;
  say(id('client-nothing'), 'Nobody is connected.');
  say(id('clients-count'), total > CLIENT_ROWS ? `${count(total, 'client')}, ${CLIENT_ROWS} shown` : total ? count(total, 'client') : '');
}

function showVolume(volume) {
  id('volume').hidden = !volume;
  document.querySelector('.columns').classList.toggle('two', Boolean(volume));
  if (!volume) {
    return;
  }
  say(id('volume-title'), volume.name);
  say(id('volume-owner'), volume.description || '');
  const looked = volume.cache_hits + volume.cache_misses;
  showFacts(id('volume-facts'), [
    ['Owner', ownerText(volume.owner)],
    ['Size', bytes(volume.size_bytes)],
    ['Used', bytes(volume.used_bytes)],
    ['Block size', bytes(volume.block_size_bytes)],
    ['Cached', bytes(volume.cached_bytes)],
    ['Cache hits', looked ? `${(Math.floor(1000 * volume.cache_hits / looked) / 10).toFixed(1)} %` : '–'],
    ['Dirty', bytes(volume.dirty_bytes)],
    ['Oldest dirty', volume.generation_age_ms === null ? '–' : duration(volume.generation_age_ms * 1000)],
  ]);
  plots.volumeThroughput.show(volume.series);
  plots.volumeLatency.show(volume.series);
}

/* --- choosing ------------------------------------------------------------------------------ */

const chosenInAddress = () => new URLSearchParams(location.hash.slice(1)).get('volume');

function choose(name, byHand) {
  view.chosen = name;
  if (byHand) {
    history.replaceState(null, '', `#${new URLSearchParams({volume: name})}`);
    /* Where the panel is not beside the table, it is far below it. */
    if (matchMedia('(max-width: 1340px)').matches) {
      id('volume').hidden = false;
      id('volume').scrollIntoView({behavior: 'smooth', block: 'start'});
    }
    showVolumes();
    poll.soon();
  }
}

/* A volume is always chosen, if there is one: that of the address, else the first. */
function keepChoice() {
  const {volumes} = view.volumes;
  if (!view.chosen) {
    view.chosen = chosenInAddress();
  }
  if (!volumes.some((v) => v.name === view.chosen) && !(view.volumes.truncated && chosenInAddress() === view.chosen)) {
    view.chosen = volumes.length ? volumes[0].name : null;
  }
}

/* --- asking -------------------------------------------------------------------------------- */

class NoAnswer extends Error {}

/* The answer as JSON; null where it is 404. Throws NoAnswer where there is none. */
async function ask(path) {
  try {
    const answer = await fetch(path, {signal: AbortSignal.timeout(TIMEOUT_MS), cache: 'no-store'});
    if (answer.ok) {
      return await answer.json();
    }
    if (answer.status === 404) {
      return null;
    }
    throw new NoAnswer(`${path}: ${answer.status}`);
  } catch (problem) {
    throw new NoAnswer(`${path}: ${problem.message}`);
  }
}

function remember(volumes) {
  const history = new Map();
  for (const v of volumes) {
    const h = view.history.get(v.name) || {read: [], write: []};
    if (v.series) {
      h.read = v.series.read_bytes.slice(-SPARK_SECONDS);
      h.write = v.series.write_bytes.slice(-SPARK_SECONDS);
    } else {
      h.read = [...h.read, rate(v, 'read_bytes') || 0].slice(-SPARK_SECONDS);
      h.write = [...h.write, rate(v, 'write_bytes') || 0].slice(-SPARK_SECONDS);
    }
    history.set(v.name, h);
  }
  view.history = history;
  view.seeded = true;
}

async function askAll() {
  const [server, volumes, clients] = await Promise.all([
    ask('v1/server'),
    ask(view.seeded ? 'v1/volumes' : 'v1/volumes?series=1'),
    ask('v1/clients'),
  ]);
  const before = view.server;
  view.now = Date.parse(server.now);
  if (before && before.started !== server.started) {
    view.news = 'Another server process answers now; its counters began at zero.';
    view.newsUntil = Date.now() + NEWS_MS;
  } else if (view.away && before) {
    view.news = 'The server answers again.';
    view.newsUntil = Date.now() + NEWS_MS;
  }
  Object.assign(view, {server, volumes, clients, away: false, answeredAt: new Date()});
  remember(volumes.volumes);
  keepChoice();
  showState();
  showServer(server);
  showVolumes();
  showClients();

  const name = view.chosen;
  const path = name && `v1/volumes/${encodeURIComponent(name)}`;
  const [volume, heat] = name ? await Promise.all([ask(path), ask(`${path}/heat`)]) : [null, null];
  if (name !== view.chosen) {
    return;
  }
  showVolume(volume);
  id('blocks').hidden = !heat;
  blockMap.show(heat);
}

/* One question after the other: a server that is slow to answer is asked less often. */
const poll = {
  timer: 0,
  busy: false,
  again: false,

  soon() {
    if (this.busy) {
      this.again = true;
      return;
    }
    clearTimeout(this.timer);
    this.run();
  },

  async run() {
    this.busy = true;
    const began = performance.now();
    try {
      await askAll();
    } catch (problem) {
      if (!(problem instanceof NoAnswer)) {
        console.error(problem);
      }
      view.away = true;
      view.seeded = false;
      showState();
    }
    this.busy = false;
    const took = performance.now() - began;
    if (document.hidden) {
      view.seeded = false; /* it goes on when it is looked at again */
      return;
    }
    this.timer = setTimeout(() => this.run(), this.again ? 0 : Math.max(POLL_MS - took, took, 50));
    this.again = false;
  },
};

document.addEventListener('visibilitychange', () => {
  if (!document.hidden) {
    poll.soon();
  }
});
addEventListener('hashchange', () => {
  const name = chosenInAddress();
  if (name && view.volumes) {
    choose(name, false);
    poll.soon();
  }
});
id('filter').addEventListener('input', () => {
  view.page = 0;
  if (view.volumes) {
    showVolumes();
  }
});
for (const [button, step] of [['page-before', -1], ['page-after', 1]]) {
  id(button).addEventListener('click', () => {
    view.page += step;
    showVolumes();
    id('volumes').scrollIntoView({block: 'nearest'});
  });
}
poll.run();
