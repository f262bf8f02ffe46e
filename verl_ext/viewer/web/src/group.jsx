// One group: grid, ledger of the chosen turn, what-if, and the conversation of the chosen sibling.
import { useLayoutEffect, useState } from "preact/hooks";
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
  const [order, setOrder] = useState("as recorded");
  const [open, setOpen] = useState(null);

  const rows = group ? sorted(group.rows, order) : [];
  const row = rows.find((one) => String(one.id) === route.row) ?? rows.find((one) => one.found) ?? rows[0];
  const k = Math.min(Number(route.turn ?? 0), Math.max(0, (row?.turns.length ?? 1) - 1));
  const askIf = (next) => go({ whatif: next ? JSON.stringify(next) : "" }, { replace: true });
  const choose = (which, turn) => go({ row: which, turn }, { replace: true });

  useLayoutEffect(() => {
    const pressed = ({ detail }) => {
      if (detail === "e") setOpen((now) => !now);
      const down = { j: 1, k: -1 }[detail] ?? 0, right = { ArrowRight: 1, ArrowLeft: -1 }[detail] ?? 0;
      if (!rows.length || !(down || right)) return;
      const now = read();
      const at = Math.max(0, rows.findIndex((one) => (now.row ? String(one.id) === now.row : one.id === row.id)));
      const next = rows[Math.max(0, Math.min(rows.length - 1, at + down))];
      choose(next.id, Math.max(0, Math.min(next.turns.length - 1, Number(now.turn ?? 0) + right)));
    };
    addEventListener("viewer-key", pressed);
    return () => removeEventListener("viewer-key", pressed);
  });

  if (!group) return <p class="empty">{error ?? "reading …"}</p>;
  if (group.id !== id) return <p class="empty">{error ?? "reading …"}</p>;
  const shown = settings && answers ? answers : null;
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
          {trains && <Methods {...{ overview, settings }} change={askIf} />}
          <label>order <select aria-label="order of siblings" value={order} onChange={(e) => setOrder(e.target.value)}>{orders.map((one) => <option>{one}</option>)}</select></label>
        </p>
      </div>
      <div class="scroll"><Grid {...{ rows, answers: shown, most, dark, choose }} selected={{ row: row?.id, turn: k }} /></div>
      {most > 0 && <Legend most={most} dark={dark} />}
      {group.split !== "train" && <p class="note">Validation: nothing is assigned, because nothing is trained on it.</p>}
      <div class="stack">
        {row?.turns.length > 0 && <Ledger row={row} k={k} own={own?.[row.id]} settings={shown ? settings : run.settings} answer={shown?.[row.id]} />}
        {group.split === "train" && <WhatIf {...{ overview, run, settings }} error={whatifError} change={askIf} />}
      </div>
     </div>
     <div class="pane">
      {row && <Conversation key={row.id} answer={shown?.[row.id]} {...{ run, row, k, rows, open, dark, most, choose }} words={route.q} />}
     </div>
    </div>
  );
}
