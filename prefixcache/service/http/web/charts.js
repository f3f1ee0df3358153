// The ledger over time (uPlot), and the pool as a bar and as a map.
"use strict";

const FATES = ["hit", "restored", "joined", "partial", "resumed", "approximate", "granularity", "evicted", "cold"];
const color = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

const LedgerChart = (() => {
  let plot = null, host, beats = { at: [] }, span = 300;
  FATES.forEach(f => { beats[f] = []; });

  // Sums since the start become tokens a second, stacked: the last curve is all prompt tokens.
  function columns() {
    const first = beats.at.findIndex(t => t >= Date.now() / 1000 - span - 1);
    const from = Math.max(1, first < 0 ? beats.at.length : first), to = beats.at.length;
    const bin = Math.max(1, Math.floor((to - from) / 300)) * (span > 600 ? 10 : 3);
    const at = [], rows = FATES.map(() => []);
    for (let i = from; i < to; i += bin) {
      const end = Math.min(i + bin, to) - 1, seconds = Math.max(.5, beats.at[end] - beats.at[i - 1]);
      at.push(beats.at[end]);
      let sum = 0;
      FATES.forEach((f, k) => { sum += Math.max(0, beats[f][end] - beats[f][i - 1]) / seconds; rows[k].push(sum); });
    }
    return [at, ...rows.reverse()];
  }

  // No longer than there is something to show, but at least a minute.
  const shown = () => Math.min(span, Math.max(60, Date.now() / 1000 - (beats.at[0] || Infinity) + 2));

  function make() {
    if (plot) plot.destroy();
    const axis = { stroke: color("dim"), grid: { stroke: color("line"), width: 1 }, ticks: { stroke: color("line"), width: 1 }, font: "11px system-ui, sans-serif" };
    plot = new uPlot({
      width: host.clientWidth, height: 220, cursor: { y: false, points: { show: false } }, legend: { show: false },
      scales: { x: { range: () => [Date.now() / 1000 - shown(), Date.now() / 1000] }, y: { range: (_, __, max) => [0, Math.max(10, max * 1.08)] } },
      axes: [{ ...axis, values: (_, ticks) => ticks.map(t => new Date(t * 1000).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", ...(span < 600 && t % 60 ? { second: "2-digit" } : {}) })) }, { ...axis, size: 56, label: "tokens a second", labelSize: 18, labelFont: "11px system-ui, sans-serif", values: (_, ticks) => ticks.map(v => (v >= 1e6 ? `${v / 1e6}M` : v >= 1e3 ? `${v / 1e3}k` : v)) }],
      series: [{}, ...[...FATES].reverse().map(f => ({ label: f, stroke: color(f), fill: color(f), width: 1, points: { show: false } }))],
    }, columns(), host);
  }

  return {
    start(element) { host = element; make(); new ResizeObserver(() => plot.setSize({ width: host.clientWidth, height: 220 })).observe(host); },
    load(history) { beats = history; plot.setData(columns()); },
    add(at, ledger) {
      if (!ledger || beats.at[beats.at.length - 1] === at) return;
      beats.at.push(at);
      FATES.forEach(f => beats[f].push(ledger[f]));
      if (beats.at.length > 4200) { beats.at.splice(0, 600); FATES.forEach(f => beats[f].splice(0, 600)); }
      plot.setData(columns());
    },
    recent(f) { const b = beats[f], i = Math.max(0, b.length - 61); return b.length ? b[b.length - 1] - b[i] : 0; },
    show(seconds) { span = seconds; make(); },
    make,
  };
})();

const PoolChart = (() => {
  const NAMES = { free: "free", private: "private", leased: "leased", cached: "cached", quarantined: "quarantined" };
  let last = null;

  function bar(element, pool) {
    const parts = { leased: pool.indexed - pool.evictable, cached: pool.evictable, private: pool.private, quarantined: pool.quarantined, free: pool.free + (pool.leaving || 0) };
    if (element.childElementCount !== 5) element.replaceChildren(...Object.keys(parts).map(k => Object.assign(document.createElement("i"), { title: k })));
    Object.entries(parts).forEach(([k, n], i) => { const part = element.children[i]; part.style.width = `${(100 * n) / pool.num_blocks}%`; part.style.background = `var(--${k})`; });
    element.setAttribute("aria-label", Object.entries(parts).map(([k, n]) => `${k} ${n}`).join(", "));
    return parts;
  }

  function map(canvas, blocks) {
    last = blocks || last;
    if (!last) return;
    const width = canvas.clientWidth, cells = last.cells, ratio = devicePixelRatio || 1;
    const size = Math.max(5, Math.min(14, Math.sqrt((width * 150) / cells.length))), columns = Math.max(1, Math.floor(width / size));
    const rows = Math.ceil(cells.length / columns);
    canvas.width = width * ratio; canvas.height = rows * size * ratio; canvas.style.height = `${rows * size}px`;
    const draw = canvas.getContext("2d"); draw.scale(ratio, ratio);
    const colors = last.states.map(color);
    for (let i = 0; i < cells.length; i++) { draw.fillStyle = colors[+cells[i]]; draw.fillRect((i % columns) * size, Math.floor(i / columns) * size, size - 1, size - 1); }
    canvas.setAttribute("aria-label", `Map of the pool in ${cells.length} cells`);
  }

  return { bar, map, names: NAMES };
})();
