// Draws the page's charts in its colours, light or dark, and lets a cell that is selected filter the table.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const drawn = new Map();
  const rows = (columns) => {
    const names = Object.keys(columns);
    const length = names.length ? columns[names[0]].length : 0;
    return Array.from({ length }, (_, at) => Object.fromEntries(names.map((name) => [name, columns[name][at]])));
  };
  const datasets = Object.fromEntries(Object.entries(data.datasets).map(([name, columns]) => [name, rows(columns)]));

  const theme = () => {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const text = { labelColor: colour("--soft"), titleColor: colour("--soft"), titleFontWeight: "normal" };
    return {
      background: "transparent",
      font: "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif",
      view: { stroke: null },
      text: { fill: colour("--soft"), color: colour("--soft") },
      axis: { ...text, gridColor: colour("--line"), domainColor: colour("--line"), tickColor: colour("--line"),
        labelFontSize: 11, titleFontSize: 12, gridOpacity: 0.7 },
      legend: { ...text, labelFontSize: 11, titleFontSize: 11 },
      title: { color: colour("--ink"), anchor: "start", fontWeight: "normal", fontSize: 13 },
      range: {
        category: ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"],
        // The dark end of a dark page's ramp would be the page.
        heatmap: dark.matches ? { scheme: "inferno", extent: [0.22, 1] } : { scheme: "yelloworangebrown" },
        ramp: { scheme: "viridis" },
      },
    };
  };

  // As many columns of a legend as there is room for beside each other.
  const fit = (part, width) => {
    if (part === null || typeof part !== "object") return;
    const labels = part.scale?.domain;
    if (part.legend?.columns && Array.isArray(labels)) {
      const longest = Math.max(...labels.map((label) => String(label).length));
      part.legend.columns = Math.max(1, Math.min(part.legend.columns, Math.floor(width / (40 + 6.6 * longest))));
    }
    Object.values(part).forEach((inner) => fit(inner, width));
  };

  const draw = async (element) => {
    const name = element.dataset.figure;
    drawn.get(name)?.finalize();
    const spec = { ...structuredClone(data.figures[name]), datasets };
    fit(data.figures[name] && spec.encoding ? spec.encoding : spec.layer, element.clientWidth);
    const options = { renderer: "svg", actions: false, config: theme(), tooltip: { theme: "custom" } };
    const result = await vegaEmbed(element, spec, options);
    drawn.set(name, result);
    result.view.addEventListener("click", (event, item) => {
      if (item && item.datum && item.datum.kind !== undefined) select(item.datum.layer, item.datum.kind);
      if (item && item.datum && item.datum.whose !== undefined) pick(item.datum);
    });
    element.dataset.drawn = "yes";
  };

  // A chart is drawn when it is first shown, and again when the colours change.
  const draw_shown = async (again) => {
    for (const element of document.querySelectorAll("[data-figure]")) {
      const shown = element.closest("[hidden]") === null;
      if (shown && (again || !element.dataset.drawn)) await draw(element);
      if (!shown && again) delete element.dataset.drawn;
    }
    document.documentElement.dataset.ready = "yes";
  };

  // What is chosen in each of a place's groups of buttons, together, names the alternative that is shown.
  for (const place of document.querySelectorAll(".place")) {
    for (const button of place.querySelectorAll("button[data-part]")) {
      button.addEventListener("click", () => {
        for (const other of button.parentElement.querySelectorAll("button"))
          other.setAttribute("aria-pressed", String(other === button));
        const chosen = [...place.querySelectorAll("button[aria-pressed=true]")].map((one) => one.dataset.part).join("|");
        for (const alternative of place.querySelectorAll(".alternative"))
          alternative.hidden = alternative.dataset.choice !== chosen;
        draw_shown(false);
      });
    }
  }

  const pick = (plan) => {
    const size = `${plan.name}: ${plan.num_compressed} components, ${plan.bits.toFixed(2)} bits per weight, plan ${plan.plan_id}. `;
    const picked = document.getElementById("picked");
    picked.textContent = size;
    if (plan.label === "plan") {
      const command = document.createElement("code");
      command.textContent = `dtmsearch export ${plan.run} --to dense --out ${plan.run}-model --store ${data.store}`;
      picked.append(command);
    }
  };

  const table = document.getElementById("components");
  const names = ["layer", "kind", "scheme"];
  const inputs = names.map((name) => document.getElementById(name));
  const filter = () => {
    if (!table) return;
    let number = 0;
    for (const row of table.tBodies[0].rows) {
      row.hidden = names.some((name, at) => inputs[at].value !== "" && inputs[at].value !== row.dataset[name]);
      number += row.hidden ? 0 : 1;
    }
    document.getElementById("found").textContent = `${number} of ${table.tBodies[0].rows.length} ${table.dataset.noun ?? "components"}`;
  };
  const select = (layer, kind) => {
    if (!table) return;
    [inputs[0].value, inputs[1].value, inputs[2].value] = [String(layer), kind, ""];
    filter();
  };
  if (table) {
    for (const input of inputs) input.addEventListener("change", filter);
    document.getElementById("clear").addEventListener("click", () => {
      for (const input of inputs) input.value = "";
      filter();
    });
    filter();
  }

  // A table that is wider than its place says so.
  const hint = () => {
    for (const wide of document.querySelectorAll(".wide"))
      wide.classList.toggle("overflows", wide.scrollWidth > wide.clientWidth + 1);
  };
  for (const wide of document.querySelectorAll(".wide")) {
    const said = document.createElement("p");
    said.className = "hint";
    said.textContent = "Scroll the table sideways for its other columns.";
    wide.after(said);
  }
  addEventListener("resize", hint);
  hint();

  dark.addEventListener("change", () => draw_shown(true));
  draw_shown(false);
})();
