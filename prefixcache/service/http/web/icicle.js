// The icicle: a row is a run of the radix tree, its width the tokens of the branch, its colour the heat.
"use strict";

const Icicle = (() => {
  const ROW = 27, MOST_ROWS = 16, NARROWEST = 1.5;
  const count = n => n.toLocaleString("en");
  let data = null, focusPath = [], host, tip, onZoom = () => {};

  // Branches come root first, each with its depth; what was left out becomes one more branch.
  function nest(branches, name) {
    const stack = [];
    for (const b of branches) {
      const node = { ...b, key: `${b.depth ? "" : name}${b.start}:${b.tokens}`, children: [] };
      stack.length = b.depth;
      if (b.depth) {
        const above = stack[b.depth - 1];
        node.key = `${above.key}/${above.children.length}`;
        above.children.push(node);
      } else node.name = name;
      stack[b.depth] = node;
    }
    const finish = node => {
      node.children.forEach(finish);
      if (node.more) {
        const [branches_, runs, tokens, ghosts] = node.more;
        node.children.push({ key: `${node.key}/more`, rest: true, branches: branches_, runs, tokens: tokens + ghosts, ghosts, heat: 0, depth: node.depth + 1, start: node.start + node.tokens, children: [] });
      }
      return node;
    };
    return finish(stack[0]);
  }

  function update(tree, chosen) {
    const spaces = tree.namespaces;
    if (!spaces.length) return empty();
    const one = spaces.find(s => s.namespace === chosen);
    const tops = one ? [nest(one.branches, one.namespace)] : spaces.map(s => nest(s.branches, s.namespace));
    const [others, runs, tokens, ghosts] = tree.more;
    if (!one && others) tops.push({ key: "others", name: `${count(others)} smaller namespaces`, tokens: tokens + ghosts, below: [runs, tokens, ghosts], heat: 0, depth: 0, start: 0, children: [] });
    const top = tops.length === 1 ? tops[0] : { key: "all", name: `${count(spaces.length + others)} namespaces`, tokens: 0, start: 0, depth: -1, heat: 0, children: tops };
    data = d3.hierarchy(top).sum(d => d.tokens);
    draw();
  }

  function empty() {
    data = null;
    host.replaceChildren(Object.assign(document.createElement("p"), { className: "empty", textContent: "Nothing is stored yet: the first commit of a worker shows here." }));
    onZoom([]);
  }

  function focused() {  // the deepest run of the zoom that still exists
    let node = data;
    for (const key of focusPath) {
      const below = (node.children || []).find(c => c.data.key === key);
      if (!below) break;
      node = below;
    }
    focusPath = node.ancestors().reverse().slice(1).map(n => n.data.key);
    return node;
  }

  function draw() {
    if (!data) return;
    const width = host.clientWidth, focus = focused();
    const above = focus.ancestors().slice(1).reverse();
    // Only what is wide enough to be seen is drawn.
    const scale = width / Math.max(1, focus.value);
    const rows = Math.min(MOST_ROWS, focus.height + 1);
    const shown = above.map((n, i) => ({ n, x: 0, w: width, row: i }));
    const place = (n, x, row) => {
      shown.push({ n, x, w: n.value * scale, row: above.length + row });
      if (row + 1 >= rows) return;
      let at = x;
      for (const c of n.children || []) {
        if (c.value * scale >= NARROWEST) place(c, at, row + 1);
        at += c.value * scale;
      }
    };
    place(focus, 0, 0);
    const height = (Math.max(...shown.map(s => s.row)) + 1) * ROW;

    let svg = d3.select(host).select("svg");
    if (svg.empty()) {
      host.replaceChildren();
      svg = d3.select(host).append("svg");
      const defs = svg.append("defs");
      const hatch = defs.append("pattern").attr("id", "hatch").attr("width", 6).attr("height", 6).attr("patternUnits", "userSpaceOnUse").attr("patternTransform", "rotate(45)");
      hatch.append("rect").attr("width", 1.4).attr("height", 6).style("fill", "var(--ink)").style("opacity", .55);
      const dots = defs.append("pattern").attr("id", "dots").attr("width", 5).attr("height", 5).attr("patternUnits", "userSpaceOnUse");
      dots.append("rect").attr("width", 5).attr("height", 5).style("fill", "var(--card)");
      dots.append("circle").attr("cx", 2).attr("cy", 2).attr("r", .9).style("fill", "var(--dim)");
    }
    svg.attr("height", height).attr("viewBox", `0 0 ${width} ${height}`);
    const active = document.activeElement && document.activeElement.dataset && document.activeElement.dataset.key;
    const run = svg.selectAll("g.run").data(shown, s => s.n.data.key).join(enter => {
      const g = enter.append("g");
      g.append("rect").attr("class", "body").attr("rx", 3);
      g.append("rect").attr("class", "hatch").attr("rx", 3);
      g.append("text").attr("x", 6).attr("y", 17);
      g.on("click", (_, s) => zoom(s.n)).on("keydown", key).on("focus", (e, s) => { describe(e.currentTarget.getBoundingClientRect(), s.n); })
        .on("pointermove", (e, s) => describe({ left: e.clientX + 12, bottom: e.clientY + 12 }, s.n)).on("pointerleave blur", () => { tip.hidden = true; });
      return g;
    });
    run.attr("class", s => `run${s.n.depth === 0 ? " root" : ""}${s.n.data.ghost ? " ghost" : ""}${s.n.data.rest ? " more" : ""}${s.n.data.heat < .35 ? " cool" : s.n.data.heat < .7 ? " tepid" : ""}`)
      .attr("role", "treeitem").attr("aria-level", s => s.n.depth + 1).attr("data-key", s => s.n.data.key).attr("aria-label", s => lines(s.n).join(", "))
      .attr("tabindex", s => (s.n === focus ? 0 : -1)).attr("transform", s => `translate(${s.x},${s.row * ROW})`);
    run.select("rect.body").attr("width", s => Math.max(1, s.w)).attr("height", ROW - 2)
      .style("fill", s => (s.n.data.ghost || s.n.data.rest || s.n.depth === 0 ? null : `color-mix(in oklab, var(--warm) ${Math.round(s.n.data.heat * 100)}%, var(--cool))`));
    run.select("rect.hatch").attr("width", s => (s.n.data.locks && s.n.depth ? Math.max(1, s.w) : 0)).attr("height", ROW - 2);
    run.select("text").text(s => label(s.n, s.w));
    if (active) { const same = svg.selectAll("g.run").filter(s => s.n.data.key === active).node(); if (same) same.focus({ preventScroll: true }); }
    onZoom(focus.ancestors().reverse());
  }

  function title(n) {
    const d = n.data;
    if (d.name !== undefined) return d.name;
    if (d.rest) return `${count(d.branches)} smaller branches`;
    return d.ids ? `${d.ids.slice(0, 12).join(" ")}${d.tokens > 12 ? " …" : ""}` : `${many(d.tokens, "token")}`;
  }

  function label(n, w) {
    const text = n.data.name !== undefined ? `${n.data.name} · ${many(n.value, "token")}` : n.data.rest ? `… ${count(n.data.branches)} more` : title(n);
    const room = Math.floor((w - 10) / 6.4);
    if (room < 3) return "";
    if (text.length <= room) return text;
    const number = count(n.data.tokens);
    if (n.data.name === undefined && !n.data.ids && !n.data.rest) return number.length <= room ? number : "";
    return room > 6 ? text.slice(0, room - 1) + "…" : "";
  }

  function seconds(s) { return s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`; }

  function lines(n) {
    const d = n.data, out = [title(n)];
    if (d.rest) { out.push(`${many(d.tokens, "token")} in ${many(d.runs, "run")}, too small to be drawn`); return out; }
    if (n.depth > 0 || d.depth > 0) out.push(`tokens ${count(d.start)} to ${count(d.start + d.tokens)} of the prompt · ${many(d.blocks || 0, "block")}`);
    if (d.below) out.push(`branch: ${many(d.below[1], "token")} in ${many(d.below[0], "run")}${d.below[2] ? `, ${count(d.below[2])} evicted and remembered` : ""}`);
    if (d.ghost) out.push("evicted: only its tokens are remembered");
    else if (d.locks && d.depth > 0) out.push("leased now: cannot be evicted");
    else if (d.idle_s !== undefined && d.depth > 0) out.push(`last used ${seconds(d.idle_s)} ago`);
    if (d.pinned) out.push("pinned");
    if (d.uses !== undefined) out.push(`used by ${many(d.uses, "lease")}`);
    if (d.parted) out.push(`${many(d.parted[1], "request")} parted at token ${count(d.parted[0])}`);
    return out;
  }

  function describe(at, n) {
    const [first, ...more] = lines(n);
    tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: first }), ...more.map(t => Object.assign(document.createElement("div"), { textContent: t })));
    tip.hidden = false;
    tip.style.left = `${Math.max(6, Math.min(at.left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${at.bottom + tip.offsetHeight + 10 > innerHeight ? Math.max(6, at.bottom - tip.offsetHeight - 40) : at.bottom + 6}px`;
  }

  function zoom(n) {
    if (n.data.rest || !n.children) n = n.parent || n;
    focusPath = n.ancestors().reverse().slice(1).map(a => a.data.key);
    tip.hidden = true;
    draw();
  }

  function key(event, s) {
    const n = s.n, siblings = n.parent ? n.parent.children : [n], at = siblings.indexOf(n);
    const to = { ArrowRight: siblings[at + 1], ArrowLeft: siblings[at - 1], ArrowDown: n.children && n.children[0], ArrowUp: n.parent }[event.key];
    if (event.key === "Enter" || event.key === " ") zoom(n);
    else if (event.key === "Escape") { const top = focused(); if (top.parent) zoom(top.parent); }
    else if (!event.key.startsWith("Arrow")) return;
    event.preventDefault();
    const target = to && d3.select(host).selectAll("g.run").filter(o => o.n === to).node();
    if (target) target.focus();
    else if (!event.key.startsWith("Arrow")) { const top = d3.select(host).selectAll("g.run").filter(o => o.n === focused()).node(); if (top) top.focus(); }
  }

  return {
    start(element, tooltip, zoomed) { host = element; tip = tooltip; onZoom = zoomed; new ResizeObserver(draw).observe(host); empty(); },
    update, zoom,
    title: n => (n.depth === 0 ? n.data.name : title(n)),
  };
})();
