// The charts of a report, behind tables.js. Everything that is shown is in the page itself.
(async () => {
  const unpack = async (id) => {
    const packed = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
    return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const data = JSON.parse(await unpack("data"));
  const byId = (id) => document.getElementById(id);
  const say = (text) => { byId("live").textContent = text; };

  for (const host of document.querySelectorAll("[data-table]")) {
    const details = host.closest("details");
    const once = () => { if (details.open && !host.hasChildNodes()) show(host, data.tables[host.dataset.table]); };
    details.addEventListener("toggle", once);
    once();
  }

  // ---- charts
  document.head.append(make("script", {}, await unpack("library")));
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const tip = (title, ...lines) => {
    const box = make("div", { class: "tip" }, make("b", {}, title));
    for (const line of lines.filter(Boolean)) box.append(make("div", {}, line));
    return box;
  };
  const charts = new Map();
  const looks = () => ({
    animation: false,
    color: ["merged", "verified", "failed", "proven", "open", "good", "link", "faint"].map(color),
    textStyle: { fontFamily: "system-ui, sans-serif", color: color("ink") },
    tooltip: {
      confine: true, backgroundColor: color("paper"), borderColor: color("line"),
      textStyle: { color: color("ink"), fontSize: 13 },
    },
  });
  const axis = (more) => ({
    axisLabel: { color: color("faint"), fontSize: 12, ...more.axisLabel },
    axisLine: { lineStyle: { color: color("line") } },
    axisTick: { show: false },
    splitLine: { lineStyle: { color: color("grid") } },
    nameTextStyle: { color: color("faint") },
    ...more.rest,
  });
  const timeAxis = (end, name) => axis({
    axisLabel: { formatter: clock, hideOverlap: true },
    rest: { type: "value", min: 0, max: end, name, nameLocation: "middle", nameGap: 28 },
  });
  const legend = () => ({ top: 0, left: 0, textStyle: { color: color("ink") }, inactiveColor: color("line") });
  const shortened = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
  const run = () => data.runs[Number(byId("filter-run").value)];

  function heat() {
    const { layers, modules, cells } = data.heat;
    if (!cells.length) return null;
    const wanted = byId("filter-heat").value.toLowerCase();
    const kept = cells.filter(([x, y]) => `layers.${layers[x]}.${modules[y]}.weight`.toLowerCase().includes(wanted));
    const most = Math.max(...cells.map((one) => one[2])), least = Math.min(...cells.map((one) => one[2]));
    const describe = ([x, y, value, count]) => [`layer ${layers[x]}, ${modules[y]}`, percent(value), count > 1 ? `${count} tensors together` : ""];
    return {
      width: 190 + 12 * layers.length, widest: 400 + 48 * layers.length, height: 110 + 22 * modules.length, series: 0, count: kept.length,
      describe: (place) => describe(kept[place]),
      option: {
        grid: { left: 160, right: 16, top: 8, bottom: 92 },
        xAxis: axis({ axisLabel: {}, rest: { type: "category", data: layers, name: "layer", nameLocation: "middle", nameGap: 26, splitLine: { show: false } } }),
        yAxis: axis({ axisLabel: { formatter: (name) => shortened(name, 24) }, rest: { type: "category", data: modules, inverse: true, splitLine: { show: false } } }),
        visualMap: {
          type: "continuous", dimension: 2, min: least, max: most > least ? most : least + Number.EPSILON, calculable: true, orient: "horizontal", left: 160, bottom: 0, itemWidth: 14, itemHeight: 220,
          precision: 6, inRange: { color: [color("cool"), color("hot")] }, textStyle: { color: color("ink") }, formatter: percent, text: ["", ""],
        },
        tooltip: { formatter: ({ value }) => tip(...describe(value)) },
        series: [{ type: "heatmap", data: kept, itemStyle: { borderColor: color("paper"), borderWidth: 1 }, emphasis: { itemStyle: { borderColor: color("ink"), borderWidth: 2 } } }],
      },
    };
  }

  const KINDS = ["merged", "verified", "proven", "failed", "worker lost", "let go"];
  const SHADES = { "worker lost": "lost", "let go": "released" };
  function bars(api, params, fill, label) {
    const [x0, y] = api.coord([api.value(1), api.value(0)]), [x1] = api.coord([api.value(2), api.value(0)]);
    const height = Math.min(18, 0.7 * api.size([0, 1])[1]), area = params.coordSys;
    const left = Math.max(area.x, x0), right = Math.min(area.x + area.width, Math.max(x1, x0 + 2));
    if (right <= left) return null;
    return {
      type: "rect", shape: { x: left, y: y - height / 2, width: right - left, height, r: 2 }, style: { fill, stroke: color("paper"), lineWidth: 1 },
      textContent: label && right - left > 70 ? { style: { text: label, fill: color("ink"), fontSize: 12 } } : undefined, textConfig: { position: "inside" },
    };
  }
  function gantt() {
    const { workers, bars: all, phases, seconds, began } = run();
    const wanted = byId("filter-worker").value.toLowerCase();
    const rows = ["phases", ...workers.filter((name) => name.toLowerCase().includes(wanted))];
    const place = new Map(rows.map((name, n) => [name, n]));
    const series = (name, shade, items) => ({
      name, type: "custom", clip: true, itemStyle: { color: color(shade) }, encode: { x: [1, 2], y: 0 },
      data: items.map(([worker, what, , from, to, why]) => ({ value: [place.get(worker), from, to], what, why })),
      renderItem: (params, api) => bars(api, params, color(shade), shade === "phase" ? items[params.dataIndex][1] : ""),
    });
    const mine = all.filter(([worker]) => place.has(worker));
    const found = [
      series("phase", "phase", phases.map(([name, from, to]) => ["phases", name, "", from, to, ""])),
      ...KINDS.filter((kind) => mine.some((bar) => bar[2] === kind))
        .map((kind) => series(kind, SHADES[kind] || kind, mine.filter((bar) => bar[2] === kind))),
    ].filter((one) => one.data.length);
    const describe = (name, { value: [row, from, to], what, why }) => [
      `${what}: ${name}`, rows[row], `${clock(to - from)}, from ${clock(from)} to ${clock(to)}`,
      new Date(1000 * (began + from)).toISOString().replace("T", " ").slice(0, 19) + " UTC", why,
    ];
    const flat = found.flatMap((one, n) => one.data.map((item, at) => [n, at, describe(one.name, item)]));
    return {
      width: 640, height: 130 + 22 * rows.length, count: flat.length, points: flat, describe: (at) => flat[at][2],
      option: {
        legend: legend(), grid: { left: 190, right: 40, top: 36, bottom: 76 },
        xAxis: timeAxis(seconds || 1, "since the run began"),
        yAxis: axis({ axisLabel: { formatter: (name) => shortened(name, 28) }, rest: { type: "category", data: rows, inverse: true, splitLine: { show: true, lineStyle: { color: color("grid") } } } }),
        dataZoom: [{ type: "slider", height: 18, bottom: 8, filterMode: "weakFilter", labelFormatter: clock, borderColor: color("line"), textStyle: { color: color("faint") } }],
        tooltip: { formatter: ({ seriesName, data: item }) => tip(...describe(seriesName, item)) },
        series: found,
      },
    };
  }

  function rate() {
    const { rates, seconds } = run();
    if (!rates.length) return null;
    const shades = { merging: "merged", verifying: "verified", proving: "proven" };
    const describe = (name, [after, value]) => [`${name}, after ${clock(after)}`, scaled(value, "B/s")];
    const points = rates.flatMap(([name, values], n) => values.map((one, at) => [n, at, describe(name, one)]));
    return {
      width: 480, height: 260, count: points.length, points, describe: (at) => points[at][2],
      option: {
        legend: legend(), grid: { left: 90, right: 40, top: 36, bottom: 52 },
        xAxis: timeAxis(seconds || 1, "since the run began"),
        yAxis: axis({ axisLabel: { formatter: (v) => scaled(v, "B/s") }, rest: { type: "value", min: 0 } }),
        tooltip: { formatter: ({ seriesName, value }) => tip(...describe(seriesName, value)) },
        series: rates.map(([name, values]) => ({
          name, type: "line", step: "start", data: values, symbolSize: 6, showSymbol: values.length < 30,
          lineStyle: { width: 2 }, areaStyle: { opacity: 0.12 }, color: color(shades[name] || "released"),
        })),
      },
    };
  }

  function memory() {
    const { rows } = data.tables.memory;
    if (!rows.length) return null;
    const names = rows.map(([worker]) => worker);
    const sorts = [["memory", 5, "merged"], ["VRAM", 7, "verified"]].filter(([, n]) => rows.some((row) => row[n] !== null));
    const points = (n) => rows.flatMap((row, at) => (row[n] === null ? [] : [[row[n], at]]));
    const series = sorts.flatMap(([name, n, shade]) => [
      { name: `${name}, peak`, type: "scatter", symbolSize: 9, color: color(shade), data: points(n) },
      { name: `${name}, limit`, type: "scatter", symbol: "rect", symbolSize: [4, 14], color: color(shade), data: points(n + 1) },
    ]).filter((one) => one.data.length);
    const least = Math.min(...series.flatMap((one) => one.data.map(([value]) => value)));
    const describe = (at) => [names[at], ...sorts.flatMap(([name, n]) => [
      `${name}: ${scaled(rows[at][n] ?? 0, "B")} at most`,
      rows[at][n + 1] === null ? `limit of ${name} not known` : `limit of ${name}: ${scaled(rows[at][n + 1], "B")}`])];
    return {
      width: 480, height: 90 + 18 * rows.length, count: rows.length, describe, series: 0,
      option: {
        legend: legend(), grid: { left: 190, right: 32, top: 36, bottom: 36 },
        xAxis: axis({ axisLabel: { formatter: (v) => scaled(v, "B"), hideOverlap: true }, rest: { type: "log", min: 10 ** Math.floor(Math.log10(least)) } }),
        yAxis: axis({ axisLabel: { formatter: (name) => shortened(name, 28) }, rest: { type: "category", data: names, inverse: true, splitLine: { show: true, lineStyle: { color: color("grid") } } } }),
        tooltip: { formatter: ({ value }) => tip(...describe(value[1])) },
        series,
      },
    };
  }

  function spectrum() {
    const known = data.spectra.filter(([, values]) => values.length);
    if (!known.length) return null;
    const describe = (name, [at, value]) => [name, `value ${at}: ${number(4).format(value)}`];
    const lines = known.map(([name, values]) => [name, values.map((v, n) => [n + 1, v]).filter(([, v]) => v > 0)]);
    const points = lines.flatMap(([name, values], n) => values.map((one, at) => [n, at, describe(name, one)]));
    return {
      width: 480, height: 340, count: points.length, points, describe: (at) => points[at][2],
      option: {
        legend: { ...legend(), type: "scroll", right: 0, formatter: (name) => shortened(name.replace(/^model\./, ""), 40) },
        grid: { left: 90, right: 24, top: 40, bottom: 48 },
        xAxis: axis({ axisLabel: {}, rest: { type: "value", min: 1, minInterval: 1, name: "number of the singular value", nameLocation: "middle", nameGap: 28 } }),
        yAxis: axis({ axisLabel: { formatter: (v) => number(2).format(v) }, rest: { type: "log" } }),
        tooltip: { formatter: ({ seriesName, value }) => tip(...describe(seriesName, value)) },
        series: lines.map(([name, values]) => ({ name, type: "line", data: values, symbolSize: 5, showSymbol: values.length < 60 })),
      },
    };
  }

  const PRINTED = [670, 900]; // pixels of a sheet of A4 between its margins
  const recipes = { heat, gantt, rate, memory, spectrum };
  function paint(name) {
    const host = document.querySelector(`[data-chart="${name}"]`);
    if (!host) return;
    const recipe = (data.runs.length || !["gantt", "rate"].includes(name)) && recipes[name]();
    byId(`chart-${name}`).hidden = !recipe;
    if (!recipe) return;
    const printing = "print" in document.documentElement.dataset;
    host.style.minWidth = printing ? "" : `${recipe.width}px`;
    host.style.width = printing ? `${PRINTED[0]}px` : "";
    host.style.height = `${printing ? Math.min(PRINTED[1], recipe.height) : recipe.height}px`;
    charts.get(name)?.chart.dispose();
    const chart = echarts.init(host, null, { renderer: "svg" });
    host.style.maxWidth = `${recipe.widest ?? 9999}px`;
    const base = looks();
    chart.setOption({ ...base, ...recipe.option, tooltip: { ...base.tooltip, ...recipe.option.tooltip } });
    charts.set(name, { chart, recipe, at: -1 });
  }
  function step(name, event) {
    const shown = charts.get(name), by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") { shown.chart.dispatchAction({ type: "hideTip" }); return; }
    if (!by || !shown.recipe.count) return;
    event.preventDefault();
    shown.at = (shown.at + by + shown.recipe.count) % shown.recipe.count;
    const [series, place] = shown.recipe.points ? shown.recipe.points[shown.at] : [shown.recipe.series, shown.at];
    shown.chart.dispatchAction({ type: "showTip", seriesIndex: series, dataIndex: place });
    say(shown.recipe.describe(shown.at).filter(Boolean).join(", "));
  }
  const all = () => Object.keys(recipes).forEach(paint);
  all();
  for (const name of Object.keys(recipes)) {
    document.querySelector(`[data-chart="${name}"]`)?.addEventListener("keydown", (event) => step(name, event));
  }
  const on = (id, kind, ...names) => byId(id)?.addEventListener(kind, () => names.forEach(paint));
  on("filter-heat", "input", "heat");
  on("filter-run", "change", "gantt", "rate");
  on("filter-worker", "input", "gantt");
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  let pending = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(pending);
    pending = requestAnimationFrame(() => charts.forEach(({ chart }) => chart.resize()));
  });
  addEventListener("beforeprint", () => { document.documentElement.dataset.print = ""; all(); });
  addEventListener("afterprint", () => { delete document.documentElement.dataset.print; all(); });
  document.documentElement.dataset.ready = "";
})();
