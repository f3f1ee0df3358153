// The live page: one stream of events in, everything drawn from it.
"use strict";

const $ = id => document.getElementById(id);
const count = n => Math.round(n).toLocaleString("en");
const many = (n, noun) => `${count(n)} ${noun}${Math.round(n) === 1 ? "" : "s"}`;
const share = (a, b) => (b ? `${((100 * a) / b).toFixed(1)} %` : "–");
const time = s => (s === null || s === undefined ? "–" : s < 1e-3 ? `${(s * 1e6).toFixed(0)} µs` : s < 1 ? `${(s * 1e3).toFixed(1)} ms` : s < 100 ? `${s.toFixed(0)} s` : s < 6000 ? `${(s / 60).toFixed(0)} min` : `${(s / 3600).toFixed(1)} h`);
const element = (tag, fields, ...children) => { const e = Object.assign(document.createElement(tag), fields); e.append(...children); return e; };

function fill(table, columns, rows, none) {
  const head = element("thead", {}, element("tr", {}, ...columns.map(([name, , numeric]) => element("th", { textContent: name, className: numeric ? "n" : "", scope: "col" }))));
  const lines = rows.map(row => {
    const tr = element("tr", { className: row.state || "" }, ...columns.map(([, show, numeric]) => { const cell = element("td", { className: numeric ? "n" : "" }, show(row)); cell.title = cell.textContent; return cell; }));
    if (row.worker) tr.dataset.worker = row.worker;
    return tr;
  });
  if (!rows.length) lines.push(element("tr", {}, element("td", { className: "none", colSpan: columns.length, textContent: none })));
  table.replaceChildren(head, element("tbody", {}, ...lines));
}

// What was resumed is left out of both sides: a request is no hit of its own.
const hitRate = tokens => share(tokens("hit") + tokens("restored") + tokens("partial") + tokens("joined"), FATES.reduce((sum, f) => sum + (f === "resumed" ? 0 : tokens(f)), 0));

const TILES = [
  ["reused", "reused, last minute", () => hitRate(LedgerChart.recent)],
  ["all", "reused since the start", s => (s.ledger ? hitRate(f => s.ledger[f]) : "–")],
  ["rate", "requests a second", s => s.requests_per_s.toFixed(s.requests_per_s < 10 ? 1 : 0)],
  ["p99", "acquire, p99", s => time((s.verbs.find(v => v.verb === "acquire") || {}).p99_s)],
  ["use", "of the pool held", s => (s.pool ? share(s.pool.num_blocks - s.pool.free - s.pool.evictable, s.pool.num_blocks) : "–")],
  ["leases", "leases", s => (s.pool ? count(s.pool.num_leases) : "0")],
  ["saved", "flights saved", s => count(s.flights_saved || 0)],
  ["age", "eviction age", s => time(s.pool && s.pool.eviction_age_s)],
];

function tiles(state) {
  const host = $("tiles");
  if (!host.childElementCount) host.append(...TILES.map(([id, text], i) => element("div", { className: `tile${i ? "" : " first"}`, id: `tile-${id}` }, element("b", { textContent: "–" }), element("span", { textContent: text }))));
  TILES.forEach(([, , show], i) => { host.children[i].firstChild.textContent = show(state); });
}

function showState(state) {
  const service = state.service;
  $("service").textContent = `${service.listening.join(", ")} · ${service.sizes || "no layout yet"} · ${service.policy}, partial ${service.partial} · up ${time(service.uptime_s)} · v${service.version}`;
  status(service.draining ? "draining" : "live", service.draining ? "draining" : "live");
  LedgerChart.add(state.at, state.ledger);
  tiles(state);
  if (state.ledger) {
    const all = FATES.reduce((a, f) => a + state.ledger[f], 0);
    $("ledger-legend").replaceChildren(...FATES.map(f => { const s = element("span", { className: "swatch" }); s.style.background = `var(--${f})`; return element("li", {}, s, `${f} `, element("b", { textContent: share(state.ledger[f], all) })); }));
  }
  if (state.pool) {
    const parts = PoolChart.bar($("pool-bar"), state.pool);
    const below = ["host", "disk"].filter(tier => state.pool[`${tier}_blocks`]).map(tier => ` · ${tier}: ${count(state.pool[`${tier}_used`])} of ${many(state.pool[`${tier}_blocks`], "block")}`).join("");
    $("pool-size").textContent = `${many(state.pool.num_blocks, "block")} of ${state.pool.block_size} tokens${below}`;
    $("pool-legend").replaceChildren(...Object.entries(parts).map(([k, n]) => { const s = element("span", { className: "swatch" }); s.style.background = `var(--${k})`; return element("li", {}, s, `${k} `, element("b", { textContent: count(n) })); }));
  }
  fill($("workers"), [
    ["worker", w => w.worker],
    ["state", w => { const pill = element("span", { className: "pill", textContent: w.state }); pill.dataset.state = w.state; return pill; }],
    ["for", w => time(w.since_s)],
    ["pid", w => (w.pid ? String(w.pid) : "–"), true],
    ["leases", w => count(w.leases), true],
    ["in hand", w => count(w.in_hand), true],
    ["no step for", w => (w.in_hand ? time(w.stalled_s) : "–"), true],
    ["untaken", w => (w.untaken ? `${count(w.untaken)}, oldest ${time(w.oldest_untaken_s)}` : "–"), true],
    ["no commit for", w => (w.uncommitted_s ? time(w.uncommitted_s) : "–"), true],
    ["namespaces", w => w.namespaces.join(", ")],
  ], state.workers, "No worker has attached yet.");
  fill($("flights"), [
    ["worker", f => f.worker],
    ["progress", f => { const bar = element("i"); bar.style.width = `${(100 * f.num_committed) / Math.max(1, f.num_tokens)}%`; return element("span", { className: "meter", title: `${f.num_committed} of ${f.num_tokens}` }, bar); }],
    ["tokens", f => count(f.num_tokens), true],
    ["waiting", f => count(f.num_waiting), true],
    ["namespace", f => f.namespace],
  ], state.flights || [], "No prompt is being computed at this moment.");
  fill($("leases"), [
    ["lease", l => `#${l.lease}`], ["worker", l => l.worker], ["namespace", l => l.namespace],
    ["tokens", l => count(l.tokens), true], ["committed", l => count(l.committed), true], ["blocks", l => count(l.blocks), true], ["ends in", l => time(l.expires_in_s), true],
  ], (state.leases || []).map(l => ({ ...l, worker: l.worker })), "No lease is out.");
  fill($("namespaces"), [
    ["namespace", n => n.namespace], ["requests", n => count(n.requests), true],
    ["reused", n => hitRate(f => n[f]), true],
    ["evicted", n => share(n.evicted, FATES.reduce((a, f) => a + n[f], 0)), true], ["cold", n => share(n.cold, FATES.reduce((a, f) => a + n[f], 0)), true],
  ], state.namespaces || [], "No request yet.");
  fill($("verbs"), [
    ["verb", v => v.verb], ["per second", v => v.per_s.toFixed(1), true], ["p50", v => time(v.p50_s), true], ["p99", v => time(v.p99_s), true], ["total", v => count(v.count), true], ["refused", v => count(v.refused), true],
  ], state.verbs, "No operation yet.");
  const shadows = state.shadows || [];
  $("whatif").hidden = !shadows.length;
  if (shadows.length) fill($("shadows"), [
    ["configuration", s => s.name], ["would have reused", s => share(s.reused, s.tokens), true], ["instead of", s => share(s.actual, s.tokens), true], ["requests seen", s => count(s.requests), true], ["left out", s => count(s.dropped), true],
  ], shadows, "");
}

function status(state, text) { const s = $("status"); if (s.textContent !== text) s.textContent = text; s.dataset.state = state; }

let tree = null;
function showTree(fresh) {
  tree = fresh || tree;
  if (!tree) return;
  const select = $("namespace"), names = tree.namespaces.map(n => n.namespace);
  if ([...select.options].slice(1).map(o => o.value).join("\n") !== names.join("\n")) {
    const chosen = select.value;
    select.replaceChildren(element("option", { value: "", textContent: "all" }), ...names.map(n => element("option", { value: n, textContent: n })));
    select.value = names.includes(chosen) ? chosen : "";
  }
  $("choose").hidden = names.length < 2;
  Icicle.update(tree, select.value);
}

function crumbs(path) {
  $("crumbs").replaceChildren(...(path.length < 2 ? [] : path).map((n, i) => { const b = element("button", { type: "button", textContent: Icicle.title(n) }); if (i === path.length - 1) b.setAttribute("aria-current", "location"); b.onclick = () => Icicle.zoom(n); return b; }));
}

function theme(name) { document.documentElement.dataset.theme = name; LedgerChart.make(); PoolChart.map($("pool-map")); showTree(); }

function start() {
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  const asked = new URLSearchParams(location.search).get("theme") || localStorage.getItem("theme");
  document.documentElement.dataset.theme = asked || (preferred.matches ? "dark" : "light");
  Icicle.start($("icicle"), $("tip"), crumbs);
  LedgerChart.start($("ledger"));
  preferred.onchange = e => { if (!localStorage.getItem("theme")) theme(e.matches ? "dark" : "light"); };
  $("theme").onclick = () => { const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark"; localStorage.setItem("theme", next); theme(next); };
  $("namespace").onchange = () => showTree();
  for (const button of document.querySelectorAll("[data-span]")) button.onclick = () => { document.querySelectorAll("[data-span]").forEach(b => b.setAttribute("aria-pressed", String(b === button))); LedgerChart.show(+button.dataset.span); };
  new ResizeObserver(() => PoolChart.map($("pool-map"))).observe($("pool-map").parentElement);

  const connect = () => {
    fetch("history").then(r => r.json()).then(h => LedgerChart.load(h)).catch(() => {});
    const stream = new EventSource("live");
    stream.addEventListener("state", e => showState(JSON.parse(e.data)));
    stream.addEventListener("tree", e => showTree(JSON.parse(e.data)));
    stream.addEventListener("blocks", e => PoolChart.map($("pool-map"), JSON.parse(e.data)));
    stream.onerror = () => { status("lost", "connection lost, trying again"); if (stream.readyState === EventSource.CLOSED) { stream.close(); setTimeout(connect, 2000); } };
  };
  connect();
}

start();
