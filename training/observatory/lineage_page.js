"use strict";
(() => {
  const R = JSON.parse(document.getElementById("records").textContent);
  const E = R.experts, V = R.events, COUNT = E.uid.length, LAST = Math.max(R.last, 1);
  const $ = (id) => document.getElementById(id);
  const fmt = (n) => Number(n).toLocaleString("en");
  const narrow = () => window.innerWidth < 700;

  // -- who is who -----------------------------------------------------------------------------------------------------
  const expertAt = new Int32Array(COUNT);
  const children = Array.from({ length: COUNT }, () => []);
  const eventsOf = Array.from({ length: COUNT }, () => []);
  for (let i = 0; i < COUNT; i++) {
    expertAt[E.row[i]] = i;
    if (E.parent[i] >= 0) children[E.parent[i]].push(i);
  }
  V.who.forEach((who, n) => who.forEach((i) => eventsOf[i].push(n)));
  const births = Float64Array.from(E.born).sort();
  const deaths = Float64Array.from(E.died.filter((_, i) => E.fate[i])).sort();
  const upTo = (sorted, step) => { // how many are <= step
    let low = 0, high = sorted.length;
    while (low < high) { const mid = (low + high) >> 1; if (sorted[mid] <= step) low = mid + 1; else high = mid; }
    return low;
  };
  const descendants = (of) => {
    const found = [of];
    for (let n = 0; n < found.length; n++) found.push(...children[found[n]]);
    return found;
  };
  const name = (i) => "expert " + E.uid[i] + " of layer " + E.layer[i];

  const plot = $("plot");

  // -- the picture ----------------------------------------------------------------------------------------------------
  const THEMES = {
    light: { text: "#1c1e26", grid: "#e6e8ee", panel: "#ffffff", founder: "#3b6fb6", newborn: "#1f9a68", gone: "#a4abb8", merged: "#9a63c9", death: "#d1495b", freeze: "#2bb3d6", thaw: "#e08a1e", part: "#7a5c2e", chosen: "#e0218a", count: "#3b6fb6" },
    dark: { text: "#e8eaf0", grid: "#2d323c", panel: "#1c1f26", founder: "#6ea3ea", newborn: "#43c990", gone: "#626a78", merged: "#b98be6", death: "#ff6b7d", freeze: "#54d2f2", thaw: "#ffb454", part: "#c9a56a", chosen: "#ff5fb5", count: "#6ea3ea" },
  };
  let theme = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const hasWebGL = (() => {
    const canvas = document.createElement("canvas");
    const context = canvas.getContext("webgl");
    if (context && context.getExtension("WEBGL_lose_context")) context.getExtension("WEBGL_lose_context").loseContext();
    return Boolean(context);
  })();
  const TYPE = hasWebGL ? "scattergl" : "scatter";

  const segments = (list, ends) => {
    const x = new Float64Array(3 * list.length).fill(NaN), y = new Float64Array(3 * list.length).fill(NaN);
    list.forEach((i, n) => { const [x0, y0, x1, y1] = ends(i); x[3 * n] = x0; y[3 * n] = y0; x[3 * n + 1] = x1; y[3 * n + 1] = y1; });
    return { x, y };
  };
  const life = (i) => [E.born[i], E.row[i], Math.max(E.died[i], E.born[i]), E.row[i]];
  const all = Array.from({ length: COUNT }, (_, i) => i);
  const of = (kind) => V.kind.map((k, n) => (k === kind && V.who[n].length ? n : -1)).filter((n) => n >= 0);
  // Thick enough to see, thin enough that neighbours stay apart.
  const thickness = (rows) => Math.min(9, Math.max(1, (0.6 * 0.8 * (plot.clientHeight || 520)) / Math.max(rows, 1)));
  let width = thickness(COUNT);
  const BARS = [
    ["founder", "founder", (i) => E.parent[i] < 0 && !E.fate[i]],
    ["newborn", "born of a split", (i) => E.parent[i] >= 0 && !E.fate[i]],
    ["gone", "died", (i) => E.fate[i] === 1],
    ["merged", "merged away", (i) => E.fate[i] === 2],
  ];
  const hidden = new Set(); // traces turned off in the legend
  const MARKS = [["death", "x-thin-open"], ["freeze", "square"], ["thaw", "square-open"], ["part", "diamond-open"]];

  const counted = (() => {
    const steps = [...new Set([0, ...births, ...deaths, LAST])].sort((a, b) => a - b);
    return { x: steps, y: steps.map((step) => upTo(births, step) - upTo(deaths, step)) };
  })();

  const traces = () => {
    const c = THEMES[theme];
    const line = (data, label, color, w, extra) => ({ type: TYPE, mode: "lines", name: label, hoverinfo: "skip", line: { color, width: w }, connectgaps: false, ...data, ...extra });
    const found = [];
    const splits = all.filter((i) => E.parent[i] >= 0), merges = all.filter((i) => E.heir[i] >= 0);
    found.push(line(segments(splits, (i) => [E.born[i], E.row[E.parent[i]], E.born[i], E.row[i]]), "split", c.newborn, 1, { opacity: 0.55 }));
    found.push(line(segments(merges, (i) => [E.died[i], E.row[i], E.died[i], E.row[E.heir[i]]]), "merge", c.merged, 1, { opacity: 0.7 }));
    for (const [key, label, test] of BARS) found.push(line(segments(all.filter(test), life), label, c[key], width));
    for (const [kind, symbol] of MARKS) {
      const mine = of(kind);
      found.push({ type: TYPE, mode: "markers", name: kind, hoverinfo: "skip", x: mine.map((n) => V.step[n]), y: mine.map((n) => E.row[V.who[n][0]]), marker: { symbol, color: c[kind], size: Math.min(8, Math.max(4, width + 2)), line: { color: c[kind], width: 1.4 } } });
    }
    found.push(line({ x: [null], y: [null] }, "chosen, and descendants", c.chosen, Math.max(2.5, width), { visible: false }));
    found.push({ type: "scatter", mode: "lines", name: "experts", hoverinfo: "skip", showlegend: false, yaxis: "y2", line: { shape: "hv", color: c.count, width: 1.5 }, ...counted });
    return found.map((trace, n) => (hidden.has(n) ? { ...trace, visible: false } : trace));
  };
  const GLYPHS = { death: "×", freeze: "■", thaw: "□", part: "◇" };
  const legend = () => {
    const c = THEMES[theme];
    const entries = [["newborn", "split", 0], ["merged", "merge", 0], ...BARS.map(([key, label]) => [key, label, 1]), ...MARKS.map(([kind]) => [kind, kind, 2])];
    $("legend").replaceChildren(...entries.flatMap(([key, label, look], n) => {
      if (!plot.data[n].x.length) return [];
      const button = document.createElement("button"), sign = document.createElement("i");
      sign.className = look === 2 ? "glyph" : "stroke";
      sign.textContent = look === 2 ? GLYPHS[key] : "";
      sign.style.setProperty("--ink", c[key]);
      sign.style.setProperty("--thick", look ? "6px" : "2px");
      button.type = "button";
      button.setAttribute("aria-pressed", !hidden.has(n));
      button.append(sign, label);
      button.addEventListener("click", () => {
        hidden.has(n) ? hidden.delete(n) : hidden.add(n);
        button.setAttribute("aria-pressed", !hidden.has(n));
        Plotly.restyle(plot, { visible: !hidden.has(n) }, [n]);
      });
      return [button];
    }));
  };
  const CHOSEN = 2 + BARS.length + MARKS.length;
  const PLAIN = Array.from({ length: CHOSEN }, (_, n) => n);

  const bands = (() => {
    const found = new Map();
    for (let i = 0; i < COUNT; i++) {
      const band = found.get(E.layer[i]) || [Infinity, -Infinity];
      found.set(E.layer[i], [Math.min(band[0], E.row[i]), Math.max(band[1], E.row[i])]);
    }
    return found;
  })();
  const whole = [COUNT - 0.4, -0.6];
  const layout = () => {
    const c = THEMES[theme], layers = [...bands.keys()], every = Math.ceil(layers.length / 24);
    const shown = layers.filter((_, n) => n % every === 0);
    const axis = { gridcolor: c.grid, zeroline: false, linecolor: c.grid, tickcolor: c.grid };
    return {
      paper_bgcolor: c.panel, plot_bgcolor: c.panel, font: { color: c.text, size: 12 }, hovermode: false,
      dragmode: narrow() ? false : "pan", uirevision: "same",
      margin: { l: narrow() ? 52 : 66, r: 14, t: 8, b: 42 },
      showlegend: false,
      xaxis: { ...axis, title: { text: "optimizer step", standoff: 6 }, range: [-0.01 * LAST, 1.02 * LAST], anchor: "y" },
      yaxis: { ...axis, domain: [0, 0.83], range: whole, showgrid: false, tickvals: shown.map((l) => (bands.get(l)[0] + bands.get(l)[1]) / 2), ticktext: shown.map((l) => "layer " + l) },
      yaxis2: { ...axis, domain: [0.87, 1], rangemode: "tozero", fixedrange: true, nticks: 3, title: { text: narrow() ? "" : "experts", font: { size: 11 } } },
      shapes: layers.slice(1).map((l) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: bands.get(l)[0] - 0.5, y1: bands.get(l)[0] - 0.5, line: { color: c.grid, width: 1 } })),
    };
  };
  const config = () => ({ responsive: true, scrollZoom: !narrow(), displaylogo: false, displayModeBar: narrow() ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "toImage"] });

  // -- time -----------------------------------------------------------------------------------------------------------
  let step = R.last, playing = false, before = 0;
  let frameOf = "";
  const veil = $("veil"), ticker = $("ticker").querySelector("div");
  const place = () => {
    const full = plot._fullLayout;
    if (!full) return;
    const { l, t, w, h } = full._size, size = [l, t, w, h].join();
    if (frameOf !== size) {
      frameOf = size;
      Object.assign($("window").style, { left: l + "px", top: t + "px", width: w + "px", height: h + "px" });
    }
    // Only this moves while the run is played: the picture below is not drawn again.
    veil.style.transform = "translateX(" + Math.min(Math.max(full.xaxis.l2p(step), -2), w) + "px)";
  };
  let told = -1;
  const show = (to) => {
    step = Math.min(Math.max(to, 0), R.last);
    place();
    const at = Math.floor(step), events = upTo(V.step, at);
    $("now").textContent = "step " + fmt(at) + ", " + fmt(upTo(births, at) - upTo(deaths, at)) + " experts";
    $("step").value = at;
    document.body.dataset.step = at;
    if (events !== told) {
      told = events;
      ticker.replaceChildren(...Array.from({ length: Math.min(8, events) }, (_, n) => paragraph(V.line[events - 1 - n])));
      if (!events) ticker.replaceChildren(paragraph("none yet", "faint"));
    }
  };
  const frame = (time) => {
    if (!playing) return;
    // The whole run in half a minute, at speed 1.
    const passed = Math.min(time - before, 100) / 30000;
    before = time;
    show(step + passed * LAST * Number($("speed").value));
    if (step >= R.last) return play(false);
    requestAnimationFrame(frame);
  };
  const play = (on) => {
    playing = on;
    $("play").textContent = on ? "Pause" : "Play";
    if (!on) return;
    if (step >= R.last) show(0);
    before = performance.now();
    requestAnimationFrame(frame);
  };

  // -- stories --------------------------------------------------------------------------------------------------------
  const paragraph = (text, kind) => {
    const p = document.createElement("p");
    p.textContent = text;
    if (kind) p.className = kind;
    return p;
  };
  const story = (i, most) => {
    const lines = [];
    lines.push(E.parent[i] < 0 ? "a founder" : "born at step " + fmt(E.born[i]) + " of expert " + E.uid[E.parent[i]]);
    const mine = eventsOf[i], skipped = Math.max(0, mine.length - most);
    if (skipped) lines.push("… " + fmt(skipped) + " earlier events");
    lines.push(...mine.slice(skipped).map((n) => V.line[n]));
    const until = fmt(E.died[i]);
    lines.push(["alive at step " + until, "died at step " + until, "merged at step " + until + (E.heir[i] >= 0 ? " into expert " + E.uid[E.heir[i]] : "")][E.fate[i]]);
    return lines;
  };
  const loads = R.loads && (() => {
    const text = atob(R.loads.values), steps = R.loads.steps.length;
    // 0: not alive; else 1 + 24 per octave above 2^-7 of the fair share.
    return (i) => R.loads.steps.map((at, s) => [at, text.charCodeAt(i * steps + s)]).filter((p) => p[1]).map(([at, code]) => [at, code === 1 ? 0 : 2 ** ((code - 2) / 24 - 7)]);
  })();
  const spark = (i) => {
    const points = loads ? loads(i) : [];
    if (points.length < 2) return [];
    const top = Math.max(...points.map((p) => p[1]), 1.2), from = points[0][0], to = points[points.length - 1][0];
    const at = ([x, y]) => ((x - from) / (to - from || 1)) * 400 + "," + (42 - (y / top) * 40);
    const box = document.createElement("div");
    box.innerHTML = '<svg class="spark" viewBox="0 0 400 44" preserveAspectRatio="none"><line x1="0" x2="400" y1="' + (42 - 40 / top) + '" y2="' + (42 - 40 / top) + '" stroke="var(--line)" stroke-dasharray="4 4"/><polyline fill="none" stroke="var(--accent)" stroke-width="2" vector-effect="non-scaling-stroke" points="' + points.map(at).join(" ") + '"/></svg>';
    return [paragraph("load over its life (dashed: fair share), at last " + points[points.length - 1][1].toPrecision(2), "faint"), box];
  };

  let chosen = -1;
  const choose = (i) => {
    chosen = i;
    document.body.dataset.chosen = i < 0 ? "" : E.layer[i] + ":" + E.uid[i];
    const panel = $("story"), heading = document.createElement("h2");
    if (i < 0) {
      document.body.dataset.highlighted = 0;
      heading.textContent = "Expert";
      panel.replaceChildren(heading, paragraph("Click or tap a bar, or search a uid: its story is told here, its descendants light up.", "faint"));
      Plotly.restyle(plot, { visible: false }, [CHOSEN]);
      Plotly.restyle(plot, { opacity: PLAIN.map((n) => (n === 0 ? 0.55 : n === 1 ? 0.7 : 1)) }, PLAIN);
      return;
    }
    const family = descendants(i);
    document.body.dataset.highlighted = family.length;
    const bars = segments(family, life), links = segments(family.slice(1), (k) => [E.born[k], E.row[E.parent[k]], E.born[k], E.row[k]]);
    heading.textContent = name(i) + ", " + fmt(family.length - 1) + " descendant" + (family.length === 2 ? "" : "s");
    const told = document.createElement("div");
    told.className = "life";
    told.append(...story(i, 200).map((line) => paragraph(line)));
    panel.replaceChildren(heading, ...spark(i), told);
    Plotly.restyle(plot, { opacity: 0.16 }, PLAIN);
    Plotly.restyle(plot, { x: [[...bars.x, ...links.x]], y: [[...bars.y, ...links.y]], visible: true }, [CHOSEN]);
  };
  // The bar under a place on the screen: the nearest row within a finger's reach that lived then.
  const under = (clientX, clientY, reach) => {
    const full = plot._fullLayout, box = plot.getBoundingClientRect();
    const { l, t } = full._size, px = clientX - box.left - l, py = clientY - box.top - t - full.yaxis._offset + t;
    if (px < 0 || py < 0 || px > full.xaxis._length || py > full.yaxis._length) return -1;
    const x = full.xaxis.p2l(px), y = full.yaxis.p2l(py), near = Math.abs(full.yaxis.p2l(py + reach) - y);
    const slack = Math.abs(full.xaxis.p2l(px + reach) - x);
    let best = -1, distance = Math.max(near, 0.5);
    for (let row = Math.max(0, Math.ceil(y - distance)); row <= Math.min(COUNT - 1, y + near + 0.5); row++) {
      const i = expertAt[row], d = Math.abs(row - y);
      if (d <= distance && E.born[i] <= x + slack && E.died[i] >= x - slack && E.born[i] <= step) { best = i; distance = d; }
    }
    return best;
  };

  // -- controls -------------------------------------------------------------------------------------------------------
  const search = (text) => {
    const match = /^\s*(?:layer\s*)?(?:(\d+)\s*[:/, ]\s*)?(\d+)\s*$/.exec(text);
    if (!text.trim()) { $("found").textContent = ""; return; }
    const found = match ? all.filter((i) => E.uid[i] === Number(match[2]) && (match[1] === undefined || E.layer[i] === Number(match[1]))) : [];
    document.body.dataset.found = found.length;
    if (!found.length) { $("found").textContent = "no expert " + text.trim(); return; }
    // The same uid lives in many layers: each search for it goes on to the next.
    const next = found[(found.indexOf(chosen) + 1) % found.length];
    $("found").textContent = found.length > 1 ? found.indexOf(next) + 1 + " of " + fmt(found.length) + ", Enter for the next" : "found";
    choose(next);
    const reach = Math.min(COUNT / 2, 40);
    if (COUNT > 120) Plotly.relayout(plot, { "yaxis.range": [E.row[next] + reach, E.row[next] - reach] });
  };
  $("search").addEventListener("change", (event) => search(event.target.value));
  $("search").addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); event.target.dataset.sent === event.target.value ? search(event.target.value) : event.target.dispatchEvent(new Event("change")); event.target.dataset.sent = event.target.value; } });
  $("play").addEventListener("click", () => play(!playing));
  $("step").max = R.last;
  $("step").addEventListener("input", (event) => { play(false); show(Number(event.target.value)); });
  $("clear").addEventListener("click", () => { $("search").value = ""; $("found").textContent = ""; $("layer").value = ""; choose(-1); Plotly.relayout(plot, { "yaxis.range": whole, "xaxis.range": [-0.01 * LAST, 1.02 * LAST] }); });
  $("layer").append(new Option("all layers", ""), ...[...bands.keys()].map((l) => new Option("layer " + l, l)));
  $("layer").addEventListener("change", (event) => {
    const band = bands.get(Number(event.target.value));
    Plotly.relayout(plot, { "yaxis.range": event.target.value === "" ? whole : [band[1] + 0.6, band[0] - 0.6] });
  });
  document.addEventListener("keydown", (event) => { if (event.key === " " && event.target === document.body) { event.preventDefault(); play(!playing); } });
  const dress = () => { document.documentElement.dataset.theme = theme; $("theme").textContent = theme === "dark" ? "light" : "dark"; };
  const draw = () => Plotly.react(plot, traces(), layout(), config()).then(() => { legend(); place(); if (chosen >= 0) choose(chosen); });
  $("theme").addEventListener("click", () => { theme = theme === "dark" ? "light" : "dark"; dress(); draw(); });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => { theme = event.matches ? "dark" : "light"; dress(); draw(); });

  let down = null;
  window.addEventListener("pointerdown", (event) => { down = plot.contains(event.target) ? [event.clientX, event.clientY] : null; }, true);
  window.addEventListener("pointerup", (event) => {
    if (!down || Math.hypot(event.clientX - down[0], event.clientY - down[1]) > 5) return;
    const i = under(event.clientX, event.clientY, event.pointerType === "touch" ? 16 : 7);
    if (i >= 0) choose(i);
  }, true);
  const tip = $("tip");
  plot.addEventListener("pointermove", (event) => {
    const i = event.pointerType === "touch" || event.buttons ? -1 : under(event.clientX, event.clientY, 7);
    tip.style.display = i < 0 ? "none" : "block";
    if (i < 0) return;
    const heading = document.createElement("strong");
    heading.textContent = name(i);
    tip.replaceChildren(heading, ...story(i, 5).map((line) => paragraph(line)));
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.min(event.clientX + 14, window.innerWidth - box.width - 8) + "px";
    tip.style.top = Math.min(event.clientY + 14, window.innerHeight - box.height - 8) + "px";
  });
  plot.addEventListener("pointerleave", () => { tip.style.display = "none"; });

  $("summary").textContent = [R.state, fmt(COUNT) + " experts in " + bands.size + " layers", fmt(V.step.length) + " events", fmt(R.last) + " steps"].join(" · ");
  if (R.notes.length) { $("notes").hidden = false; $("notes").textContent = R.notes.join(" "); }
  dress();
  Plotly.newPlot(plot, traces(), layout(), config()).then(() => {
    plot.on("plotly_relayout", () => {
      place();
      const [low, high] = plot._fullLayout.yaxis.range, now = thickness(Math.abs(high - low));
      if (Math.abs(now - width) < 0.2 * width) return;
      width = now;
      Plotly.restyle(plot, { "line.width": now }, BARS.map((_, n) => 2 + n));
      Plotly.restyle(plot, { "line.width": Math.max(2.5, now) }, [CHOSEN]);
    });
    plot.on("plotly_relayouting", place);
    plot.on("plotly_afterplot", place);
    legend();
    show(R.last);
    choose(-1);
    document.body.dataset.ready = "yes";
  });
})();
