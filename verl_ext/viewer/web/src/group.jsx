// One group: grid, ledger of the chosen turn, what-if, and the conversation of the chosen sibling.
import { useLayoutEffect } from "preact/hooks";
import { get } from "./api.js";
import { Conversation } from "./conversation.jsx";
import { Grid, Legend, orders, sorted, strongest } from "./grid.jsx";
import { Ledger } from "./ledger.jsx";
import { Solved } from "./list.jsx";
import { go, read, useAnswer } from "./route.js";
import { Copy, visible } from "./text.jsx";
import { Methods, WhatIf } from "./whatif.jsx";

const parse = (text) => { try { return JSON.parse(text); } catch { return null; } };

export function GroupView({ overview, run, route, dark }) {
  const id = Number(route.group);
  const [group, error] = useAnswer(() => get(`api/${run.run}/group`, { id, q: route.q }), [run.run, id, run.revision, route.q]);
  const wanted = route.whatif ? parse(route.whatif) : null;
  const settings = wanted && { ...run.settings, ...wanted };  // a link by hand may name one option only
  const trains = group?.split === "train" && overview.controls.length > 0;
  const ask = (wanted) => (trains && wanted && group?.id === id ? get(`api/${run.run}/whatif`, { id, settings: JSON.stringify(wanted) }) : null);
  const [own] = useAnswer(() => ask(run.settings), [group, trains]);
  const [answers, whatifError] = useAnswer(() => ask(settings), [group, trains, route.whatif]);
  const order = route.order ?? orders[0];
  const open = { all: true, none: false }[route.open] ?? null;
  const toggle = () => go({ open: read().open === "all" ? "none" : "all" }, { replace: true });

  const rows = group ? sorted(group.rows, order) : [];
  const row = rows.find((one) => String(one.at + 1) === route.row) ?? rows.find((one) => one.found) ?? rows[0];
  const k = Math.min(Number(route.turn ?? 0), Math.max(0, (row?.turns.length ?? 1) - 1));
  const askIf = (next) => go({ whatif: next ? JSON.stringify(next) : "" }, { replace: true });
  const choose = (sibling, turn) => go({ row: sibling, turn }, { replace: true });

  useLayoutEffect(() => {
    const pressed = ({ detail }) => {
      if (detail === "e") toggle();
      const down = { j: 1, k: -1 }[detail] ?? 0, right = { ArrowRight: 1, ArrowLeft: -1 }[detail] ?? 0;
      if (!rows.length || !(down || right)) return;
      const now = read();
      const at = Math.max(0, rows.findIndex((one) => (now.row ? String(one.at + 1) === now.row : one.at === row.at)));
      const next = rows[Math.max(0, Math.min(rows.length - 1, at + down))];
      choose(next.at + 1, Math.max(0, Math.min(next.turns.length - 1, Number(now.turn ?? 0) + right)));
    };
    addEventListener("viewer-key", pressed);
    return () => removeEventListener("viewer-key", pressed);
  });

  if (!group) return <p class="empty">{error ?? "reading …"}</p>;
  if (group.id !== id) return <p class="empty">{error ?? "reading …"}</p>;
  const shown = settings && !whatifError ? answers : null;  // with an error, answers are those of the question before
  const most = strongest(rows, shown);
  return (
    <div class="group">
     <div class="pane">
      <div class="title">
        <h2 dir="auto">{visible(group.prompt || `group ${group.label.slice(0, 8)}`)}</h2>
        <p>
          step {group.step}{group.split !== "train" && ` · ${group.split}`} · <Solved {...group} /> · {group.tokens.toLocaleString("en")} tokens
          {row?.gold !== null && row?.gold !== undefined && <> · expected <b>{visible(row.gold)}</b></>}
          {group.flags.map((flag) => <span class="tag">{flag}</span>)}
        </p>
        <p class="row">
          <button title="the group before" disabled={!group.before} onClick={() => go({ group: group.before, row: "", turn: "" })}>◂</button>
          <button title="the group after" disabled={!group.after} onClick={() => go({ group: group.after, row: "", turn: "" })}>▸</button>
          <Copy text={() => location.href} label="link" />
          {group.prompt_key && <a title="in other runs and steps" href={`#${new URLSearchParams({ run: run.run, view: "prompt", prompt: group.prompt_key, group: id })}`}>same prompt</a>}
          {trains && <Methods {...{ overview, run, settings }} change={askIf} />}
          <label>order <select aria-label="order of siblings" value={order} onChange={(e) => go({ order: e.target.value === orders[0] ? "" : e.target.value }, { replace: true })}>{orders.map((one) => <option>{one}</option>)}</select></label>
        </p>
      </div>
      <div class="scroll"><Grid {...{ rows, answers: shown, most, dark, choose }} selected={{ row: row?.at, turn: k }} /></div>
      {most > 0 && <Legend most={most} dark={dark} />}
      {group.split !== "train" && <p class="note">Validation: nothing is assigned, because nothing is trained on it.</p>}
      <div class="stack">
        {row?.turns.length > 0 && <Ledger {...{ rows, row, k, own }} settings={shown ? settings : run.settings} answers={shown} />}
        {group.split === "train" && <WhatIf {...{ overview, run, settings }} error={whatifError} change={askIf} />}
      </div>
     </div>
     <div class="pane">
      {row && <Conversation key={row.id} answer={shown?.[row.id]} {...{ run, row, k, rows, open, toggle, dark, most, choose }} words={route.q} />}
     </div>
    </div>
  );
}
