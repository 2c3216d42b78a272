"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const fmt = (n) => Number(n).toLocaleString("en");
  const make = (tag, text, className) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  };
  const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const STATES = { h: "healthy", o: "overloaded", s: "starved", n: "newborn", f: "frozen" };
  const WAIT = { running: 1000, waiting: 1000, unknown: 2000 };

  let versions = {}, state = "", last = {};
  let population = null, timeline = null, chosen = null, served = null;
  const seen = new Set();

  // -- status ---------------------------------------------------------------------------------------------------------
  const tell = (id, text) => { $(id).hidden = !text; $(id).textContent = text || ""; };
  const showStatus = (s) => {
    last = s;
    state = s.state;
    $("state").textContent = { checkpoint: "saved model", unknown: "of another machine" }[state] || state;
    $("state").dataset.state = state;
    document.body.dataset.state = state;
    tell("waiting", s.state === "waiting" ? "Waiting: " + s.waiting : "");
    tell("notes", (s.notes || []).join(" "));
    $("kind").textContent = [s.family, s.preset && "preset " + s.preset].filter(Boolean).join(", ");
    $("step").textContent = s.step === undefined ? "–" : fmt(s.step);
    $("progress").hidden = !(s.max_steps && s.done !== null);
    if (s.max_steps) $("progress").value = Math.min(1, s.done / s.max_steps);
    $("loss").textContent = s.loss === null || s.loss === undefined ? "–" : s.loss.toFixed(3);
    $("experts").textContent = s.experts === undefined ? "–" : fmt(s.experts);
    $("happened").textContent = s.events === undefined ? "–" : fmt(s.events);
    $("phase").textContent = s.phase || "–";
    document.querySelector(".phase").hidden = !s.phase;
    $("reader").textContent = s.model ? "read by " + s.model : "no saved model yet";
  };

  // -- population -----------------------------------------------------------------------------------------------------
  const limit = () => { // the load that fills a cell: few experts are above it
    const loads = population.layers.flatMap((l) => l.load).filter((x) => x !== null).sort((a, b) => a - b);
    return Math.max(2, loads.length ? loads[Math.floor(0.97 * (loads.length - 1))] : 0);
  };
  const canvases = new Map();
  const showLegend = () => {
    const c = population.counts, l = population.limits;
    const hints = { overloaded: "load above " + l.split_load, starved: "load below " + l.death_load, newborn: "younger than " + l.min_age_steps + " steps" };
    $("legend").replaceChildren(...Object.values(STATES).map((name) => {
      const item = make("span"), dot = make("i", undefined, { starved: "hollow", newborn: "ringed" }[name]);
      dot.style.setProperty("--ink", "var(--" + name + ")");
      item.title = hints[name] || "";
      item.append(dot, name + " " + fmt(c[name]));
      return item;
    }));
  };
  const showPopulation = () => {
    const host = $("layers");
    if (!population || !population.layers.length) return;
    const ids = population.layers.map((l) => l.layer).join();
    if (host.dataset.ids !== ids) {
      host.dataset.ids = ids;
      canvases.clear();
      host.replaceChildren(...population.layers.map((l) => {
        const row = make("div", undefined, "layer"), label = make("p", "layer " + l.layer + " "), canvas = make("canvas");
        label.append(make("small"));
        canvas.addEventListener("click", (event) => pick(l.layer, event));
        row.append(label, canvas);
        canvases.set(l.layer, { canvas, count: label.lastChild });
        return row;
      }));
    }
    showLegend();
    draw();
  };
  const geometry = (layer) => {
    const width = canvases.get(layer.layer).canvas.clientWidth || 300;
    const most = Math.max(...population.layers.map((l) => l.uid.length));
    const cell = Math.max(8, Math.min(42, Math.floor(Math.sqrt((width * (most > 200 ? 90 : 60)) / most))));
    const columns = Math.max(1, Math.floor(width / cell));
    return { width, cell, columns, height: Math.max(1, Math.ceil(layer.uid.length / columns)) * cell };
  };
  const draw = () => {
    if (!population) return;
    const colors = Object.fromEntries(Object.entries(STATES).map(([letter, name]) => [letter, ink(name)]));
    const panel = ink("panel"), ring = ink("chosen"), full = limit(), ratio = window.devicePixelRatio || 1;
    const lit = litUp();
    for (const layer of population.layers) {
      const { canvas, count } = canvases.get(layer.layer), g = geometry(layer);
      const size = [Math.round(g.width * ratio), Math.round(g.height * ratio)];
      if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
      canvas.style.height = g.height + "px";
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", "layer " + layer.layer + ": " + layer.uid.length + " experts");
      count.textContent = fmt(layer.uid.length) + (layer.uid.length === 1 ? " expert" : " experts");
      const c = canvas.getContext("2d");
      c.setTransform(ratio, 0, 0, ratio, 0, 0);
      c.clearRect(0, 0, g.width, g.height);
      c.textAlign = "center";
      c.textBaseline = "middle";
      layer.uid.forEach((uid, n) => {
        const x = (n % g.columns + 0.5) * g.cell, y = (Math.floor(n / g.columns) + 0.5) * g.cell;
        const most = g.cell / 2 - 1, load = layer.load[n], letter = layer.state[n];
        const r = Math.max(Math.min(most, 2.2), most * Math.sqrt(Math.min(1, (load === null ? 0.5 : load) / full)));
        c.fillStyle = c.strokeStyle = colors[letter];
        c.beginPath();
        c.arc(x, y, letter === "s" ? Math.max(r, most * 0.3) - 0.7 : r, 0, 7);
        if (letter === "s") { c.lineWidth = 1.4; c.stroke(); } else c.fill();
        if (letter === "n" && g.cell > 11) { c.lineWidth = 1; c.beginPath(); c.arc(x, y, Math.min(most, r + 2.5), 0, 7); c.stroke(); }
        const key = layer.layer + ":" + uid;
        if (lit.has(key) || chosen === key) {
          c.lineWidth = Math.max(1.5, Math.min(3, g.cell / 10));
          c.strokeStyle = ring;
          c.beginPath();
          c.arc(x, y, most - 0.5, 0, 7);
          c.stroke();
        }
        const name = String(uid);
        c.font = "600 11px system-ui, sans-serif";
        if (letter !== "s" && 2 * r > c.measureText(name).width + 4) {
          c.fillStyle = panel;
          c.fillText(name, x, y + 0.5);
        }
      });
    }
  };
  const pick = (number, event) => {
    const layer = population.layers.find((l) => l.layer === number), g = geometry(layer);
    const box = canvases.get(number).canvas.getBoundingClientRect();
    const n = Math.floor((event.clientY - box.top) / g.cell) * g.columns + Math.floor((event.clientX - box.left) / g.cell);
    chosen = n >= 0 && n < layer.uid.length ? number + ":" + layer.uid[n] : null;
    tellWho();
    draw();
  };
  const tellWho = () => {
    if (!chosen) { $("who").textContent = "A circle is an expert, its size the load; tap one to read about it."; return; }
    const [number, uid] = chosen.split(":").map(Number), layer = population.layers.find((l) => l.layer === number);
    const n = layer ? layer.uid.indexOf(uid) : -1;
    if (n < 0) { $("who").textContent = "Expert " + uid + " of layer " + number + " is no longer alive."; return; }
    const load = layer.load[n] === null ? "load not measured yet" : "load " + layer.load[n] + " of fair share";
    const born = layer.parent[n] < 0 ? "there from the beginning" : "born at step " + fmt(layer.born[n]) + " of " + layer.parent[n];
    $("who").textContent = ["Expert " + uid + " of layer " + number + ": " + STATES[layer.state[n]], load, born].join(", ") + ".";
  };

  // -- timeline -------------------------------------------------------------------------------------------------------
  const SVG = "http://www.w3.org/2000/svg";
  const node = (tag, attributes, text) => {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const LEFT = 44, RIGHT = 6;
  const chart = (title, height, low, high, paint, readout, label) => {
    const host = make("div", undefined, "chart"), head = make("p"), value = make("span");
    head.append(make("span", title), value);
    const width = Math.max(200, $("charts").clientWidth), svg = node("svg", { height, viewBox: "0 0 " + width + " " + height });
    const steps = timeline.steps, first = steps[0], end = steps[steps.length - 1];
    const x = (step) => LEFT + ((step - first) / Math.max(1, end - first)) * (width - LEFT - RIGHT);
    const y = (v) => height - 4 - ((v - low) / (high - low || 1)) * (height - 10);
    for (const v of [low, high]) {
      svg.append(node("line", { x1: LEFT, x2: width - RIGHT, y1: y(v), y2: y(v), stroke: "var(--line)" }));
      svg.append(node("text", { x: LEFT - 6, y: y(v) + 4, "text-anchor": "end" }, label(v)));
    }
    paint(svg, x, y);
    const hair = node("line", { y1: 2, y2: height - 4, stroke: "var(--faint)", visibility: "hidden" });
    svg.append(hair);
    const move = (event) => {
      const box = svg.getBoundingClientRect(), at = first + ((event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT)) * (end - first);
      let n = 0;
      while (n < steps.length - 2 && steps[n + 1] <= at) n++;
      const inside = at >= first && at <= end;
      hair.setAttribute("visibility", inside ? "visible" : "hidden");
      hair.setAttribute("x1", x(steps[n]));
      hair.setAttribute("x2", x(steps[n]));
      $("at").textContent = inside ? "step " + fmt(steps[n]) : "";
      value.textContent = inside ? readout(n) : "";
    };
    svg.addEventListener("pointermove", move);
    svg.addEventListener("pointerleave", () => { hair.setAttribute("visibility", "hidden"); value.textContent = $("at").textContent = ""; });
    host.append(head, svg);
    return host;
  };
  const short = (v) => (Math.abs(v) >= 100000 ? (v / 1000).toFixed(0) + "k" : Math.abs(v) >= 100 || Number.isInteger(v) ? fmt(Math.round(v)) : v.toPrecision(3));
  const showTimeline = () => {
    const t = timeline;
    if (!t || (!t.experts.some(Boolean) && !t.loss.mean.some((v) => v !== null))) return;
    const charts = [], steps = t.steps, bins = steps.length - 1;
    const high = Math.max(...t.experts), floor = Math.min(...t.experts), room = Math.max(1, Math.ceil((high - floor) * 0.1));
    charts.push(chart("experts", 92, Math.max(0, floor - room), high + room, (svg, x, y) => {
      const d = t.experts.map((v, n) => (n ? "H" + x(steps[n]) + "V" + y(v) : "M" + x(steps[0]) + "," + y(v))).join("");
      svg.append(node("path", { d, fill: "none", stroke: "var(--accent)", "stroke-width": 1.8 }));
    }, (n) => fmt(t.experts[n]), short));
    const known = t.loss.mean.map((v, n) => n).filter((n) => t.loss.mean[n] !== null);
    if (known.length) {
      const low = Math.min(...known.map((n) => t.loss.low[n])), top = Math.max(...known.map((n) => t.loss.high[n]));
      const pad = (top - low || 1) * 0.04;
      charts.push(chart("training loss, nats per token", 118, low - pad, top + pad, (svg, x, y) => {
        const middle = (n) => (x(steps[n]) + x(steps[n + 1])) / 2;
        const line = (ns, values) => ns.map((n, k) => (k ? "L" : "M") + middle(n) + "," + y(values[n])).join("");
        const back = [...known].reverse().map((n) => "L" + middle(n) + "," + y(t.loss.low[n])).join("");
        svg.append(node("path", { d: line(known, t.loss.high) + back + "Z", fill: "var(--accent)", opacity: 0.18 }));
        svg.append(node("path", { d: line(known, t.loss.mean), fill: "none", stroke: "var(--accent)", "stroke-width": 1.8 }));
      }, (n) => (t.loss.mean[n] === null || n >= bins ? "" : t.loss.mean[n].toFixed(3)), short));
    }
    const kinds = Object.keys(t.events);
    if (kinds.length) {
      const sums = Array.from({ length: bins }, (_, n) => kinds.reduce((sum, kind) => sum + t.events[kind][n], 0));
      charts.push(chart("events", 74, 0, Math.max(...sums, 1), (svg, x, y) => {
        const width = Math.max(2, (x(steps[bins]) - x(steps[0])) / bins - 0.6), base = new Array(bins).fill(0);
        for (const kind of kinds) {
          const d = t.events[kind].map((v, n) => {
            if (!v) return "";
            const from = y(base[n]);
            base[n] += v;
            return "M" + x(steps[n]) + "," + from + "V" + y(base[n]) + "h" + width + "V" + from + "Z";
          }).join("");
          svg.append(node("path", { d, fill: "var(--" + kind + ")" }));
        }
      }, (n) => kinds.filter((kind) => t.events[kind][n]).map((kind) => t.events[kind][n] + " " + kind).join(", "), short));
    }
    const ends = make("p");
    ends.append(make("span", "step " + fmt(steps[0])), make("span", fmt(steps[bins])));
    ends.style.paddingLeft = LEFT + "px";
    const axis = make("div", undefined, "chart");
    axis.append(ends);
    $("charts").replaceChildren(...charts, axis);
    $("kinds").replaceChildren(...kinds.map((kind) => {
      const item = make("span"), mark = make("i");
      mark.style.setProperty("--ink", "var(--" + kind + ")");
      item.append(mark, kind);
      return item;
    }));
  };

  // -- events, leaderboards -------------------------------------------------------------------------------------------
  const showEvents = (lines) => {
    if (!lines || !lines.length) return;
    const first = seen.size === 0;
    $("events").replaceChildren(...lines.map(({ kind, line }) => {
      const shown = make("p", line, first || seen.has(line) ? "" : "new");
      shown.style.setProperty("--ink", "var(--" + kind + ")");
      return shown;
    }));
    seen.clear();
    lines.forEach(({ line }) => seen.add(line));
  };
  const cell = (value, column) => {
    if (value === null || value === undefined) return "";
    if (typeof value !== "number" || Number.isInteger(value)) return String(value);
    return column === "contribution" || column === "sensitivity" ? value.toExponential(2) : value.toFixed(2);
  };
  const WORDS = ["reads", "frozen"];
  const table = (board, title) => {
    const shown = make("table"), head = make("thead"), body = make("tbody"), names = make("tr");
    shown.append(make("caption", title));
    names.append(...board.columns.map((name) => make("th", name.replace("_", " "), WORDS.includes(name) ? "words" : "")));
    head.append(names);
    body.append(...board.rows.map((row) => {
      const line = make("tr");
      line.append(...row.map((value, n) => make("td", cell(value, board.columns[n]), WORDS.includes(board.columns[n]) ? "words" : "")));
      return line;
    }));
    shown.append(head, body);
    const box = make("div", undefined, "scroll");
    box.append(shown);
    return box;
  };
  const showBoard = (board) => {
    const found = [];
    if (board && board.measured) found.push(table(board.measured, "Most valuable, as measured on a text at step " + fmt(board.measured.step) + " (contribution to the loss, nats per token)"));
    if (board && board.busiest) found.push(table(board.busiest, "Busiest at step " + fmt(board.busiest.step)));
    if (found.length) $("boards").replaceChildren(...found);
  };

  // -- prompt ---------------------------------------------------------------------------------------------------------
  const litUp = () => {
    const lit = new Set();
    if (served && served.row !== null) served.layers.forEach((tokens, layer) => tokens[served.row].forEach(([uid]) => lit.add(layer + ":" + uid)));
    return lit;
  };
  const showServed = () => {
    const head = make("thead"), names = make("tr"), body = make("tbody");
    names.append(make("th", "token"), ...served.layers.map((_, layer) => make("th", "layer " + layer)));
    head.append(names);
    body.append(...served.tokens.map((token, n) => {
      const line = make("tr");
      line.tabIndex = 0;
      line.append(make("td", token), ...served.layers.map((tokens) => {
        const box = make("td");
        box.append(...tokens[n].map(([uid, weight]) => {
          const chip = make("span", String(uid), "chip");
          chip.style.setProperty("--h", (uid * 137.508) % 360);
          chip.append(make("small", weight.toFixed(2).replace(/^0/, "")));
          return chip;
        }));
        return box;
      }));
      const choose = () => {
        served.row = served.row === n ? null : n;
        [...body.children].forEach((row, k) => row.classList.toggle("on", k === served.row));
        draw();
      };
      line.addEventListener("click", choose);
      line.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(); });
      return line;
    }));
    $("served").replaceChildren(head, body);
  };
  $("ask").addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = $("ask").querySelector("button");
    button.disabled = true;
    $("answer").textContent = "Reading; the first time the model is loaded.";
    try {
      const reply = await fetch("route", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ prompt: $("prompt").value }) });
      const found = await reply.json();
      if (found.error) { $("answer").textContent = found.error; served = null; $("served").replaceChildren(); } else {
        served = { ...found, row: null };
        $("answer").textContent = "Read by " + found.model + ", step " + fmt(found.step) + ": experts by uid with their routing weight, " +
          "tap a token to light up its experts above." + (found.cut ? " The last " + fmt(found.cut) + " tokens were left out." : "");
        showServed();
      }
      draw();
    } catch (error) {
      $("answer").textContent = "The page's server does not answer: " + error.message;
    }
    button.disabled = false;
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("ask").requestSubmit(); }
  });

  // -- lineage --------------------------------------------------------------------------------------------------------
  const drawLineage = () => {
    const frame = make("iframe");
    frame.title = "lineage";
    frame.src = "lineage";
    $("lineage").querySelectorAll("iframe").forEach((old) => old.remove());
    $("lineage").append(frame);
  };
  $("lineage").addEventListener("toggle", () => { if ($("lineage").open && !$("lineage").querySelector("iframe")) drawLineage(); });
  $("anew").addEventListener("click", drawLineage);

  // -- following ------------------------------------------------------------------------------------------------------
  const take = (answer) => {
    versions = answer.versions;
    showStatus(answer.status);
    if ("population" in answer) { population = answer.population; showPopulation(); tellWho(); }
    if ("timeline" in answer) { timeline = answer.timeline; showTimeline(); }
    if ("events" in answer) showEvents(answer.events);
    if ("board" in answer) showBoard(answer.board);
    document.body.dataset.ready = "yes";
  };
  const poll = async () => {
    try {
      const reply = await fetch("state?" + new URLSearchParams(versions));
      if (!reply.ok) throw new Error(reply.statusText);
      take(await reply.json());
    } catch (error) {
      $("state").textContent = "the page's server does not answer";
      $("state").dataset.state = "gone";
    }
    setTimeout(poll, document.hidden ? 5000 : WAIT[state] || 3000);
  };
  let resized = 0;
  const again = () => { cancelAnimationFrame(resized); resized = requestAnimationFrame(() => { draw(); showTimeline(); }); };
  window.addEventListener("resize", again);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  poll();
})();
