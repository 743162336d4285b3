// Follows what the server says of runs: cells of the list, or the line over a report.
(() => {
  "use strict";
  const live = document.getElementById("live");
  const EVERY_MS = 2000;

  const list = (runs) => {
    const rows = new Map([...document.querySelectorAll("tr[data-run]")].map((row) => [row.dataset.run, row]));
    if (runs.some((run) => !rows.has(run.run)) || runs.length !== rows.size) location.reload();
    for (const run of runs)
      for (const cell of rows.get(run.run)?.querySelectorAll("[data-key]") ?? [])
        if (cell.textContent !== run[cell.dataset.key]) cell.textContent = run[cell.dataset.key];
    live.textContent = "";
  };

  const one = (run) => {
    const said = `${run.status}: ${run.progress}`;
    live.dataset.first ??= said;
    live.textContent = said + (said === live.dataset.first ? "" : ". Load this page again for what is new.");
  };

  const look = async () => {
    if (!document.hidden) {
      try {
        const answer = await fetch(live.dataset.url, { credentials: "same-origin" });
        const said = answer.ok ? await answer.json() : null;
        if (said !== null) (Array.isArray(said) ? list : one)(said);
        else live.textContent = "The server refuses: open the address that dtmsearch ui printed.";
      } catch {
        live.textContent = "The server does not answer any more.";
      }
    }
    setTimeout(look, EVERY_MS);
  };
  if (live?.dataset.url) look();
})();
