// What was said and run in one trajectory.
import { useEffect, useRef, useState } from "preact/hooks";
import { get } from "./api.js";
import { colour, signed } from "./colour.js";
import { sign } from "./grid.jsx";
import { useAnswer } from "./route.js";
import { Code, Copy, Cut, Diff, Prose, start, visible, whole } from "./text.jsx";

export function Conversation({ run, row, answer, k, rows, open, toggle, dark, most, choose, words }) {
  const [talk, error] = useAnswer(() => get(`api/${run.run}/conversation`, { id: row.id }), [run.run, row.id]);
  const at = useRef();
  useEffect(() => { at.current?.querySelector(`[data-turn="${k}"]`)?.scrollIntoView({ block: "nearest" }); }, [k, talk]);
  useEffect(() => mark(at.current, words), [talk, words, open, k]);
  if (!talk) return <p class="empty">{error ?? "reading …"}</p>;
  const where = { run: run.run, id: row.id };
  const mixed = new Set(talk.turns.flatMap((turn) => turn.weights ?? [])).size > 1;  // sampled while weights changed
  return (
    <section class="talk" ref={at}>
      <h3>Trajectory {row.at + 1} <span class="faint">ended by {row.finish.replaceAll("_", " ")}{row.weights?.length > 0 && ` · weights of step ${[...new Set(row.weights)].join(" to ")}`}{row.index !== null && row.index !== undefined && ` · data row ${row.index}`}{row.pred && ` · answered ${visible(row.pred)}`}</span>
        <button class="quiet" title="open or close everything (e)" onClick={toggle}>{open ? "close all" : "open all"}</button>
        <Copy text={() => JSON.stringify(talk, null, 1)} label="copy as JSON" /></h3>
      {talk.fault && <p><strong class="bad">{visible(talk.fault)}</strong></p>}
      {talk.prompt.map((message, m) => (
        <Fold title={message.role} open={open ?? message.role === "user"} kind={`message ${message.role === "user" ? "user" : "system"}`}>
          <Prose text={start(message.content)} /><Cut text={message.content} {...where} path={`prompt/${m}/content`} />
        </Fold>))}
      {talk.turns.map((turn, m) => (
        <Turn {...{ turn, m, row, answer, mixed, where, most, dark, open, choose }} here={m === k} />))}
      <Partners {...{ run, row, rows, talk }} />
    </section>
  );
}

// Paints what was searched for, without touching the text: the browser's own highlights.
function mark(element, words = "") {
  if (!element || !globalThis.Highlight) return;
  CSS.highlights.delete("found");
  const wanted = words.toLowerCase().replaceAll('"', " ").split(/\s+/).filter(Boolean);
  if (!wanted.length) return;
  const ranges = [], nodes = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  while (nodes.nextNode() && ranges.length < 2000) {
    const text = nodes.currentNode.data.toLowerCase();
    for (const word of wanted) {
      for (let at = text.indexOf(word); at >= 0 && ranges.length < 2000; at = text.indexOf(word, at + word.length)) {
        const range = new Range();
        range.setStart(nodes.currentNode, at);
        range.setEnd(nodes.currentNode, Math.min(at + word.length, nodes.currentNode.length));
        ranges.push(range);
      }
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

function Fold({ title, open, kind, children }) {
  return <details class={kind} open={open}><summary>{title}</summary>{children}</details>;
}

function Turn({ turn, m, row, answer, mixed, where, most, dark, open, here, choose }) {
  const [raw, setRaw] = useState(turn.calls.some((call) => call.error));  // what could not be read is best seen as written
  const [byToken, setByToken] = useState(false);
  const text = start(turn.text);
  const calls = turn.calls.length > 0;
  const prose = calls && !raw ? text.split("<tool_call>")[0].trim() : text;
  const numbers = row.turns[m];
  const advantage = (answer ?? row).dropped ? null : answer ? answer.turns[m]?.advantage : numbers.advantage;
  const shade = advantage ? colour(advantage, most, dark) : {};
  return (
    <article class={here ? "turn here" : "turn"} data-turn={m} style={{ borderLeftColor: shade.background }}>
      <h4 onClick={() => choose(row.at + 1, m)}>
        turn {m} <span class="faint">{sign(row, m)[1]} · {numbers.tokens} tokens
          {mixed && turn.weights && ` · weights of step ${[...new Set(turn.weights)].join(" to ")}`}
          {numbers.broken && ` · breaks the format: ${numbers.broken.replaceAll("_", " ")}`}</span>
        {advantage !== null && advantage !== undefined && <span class="pill" style={shade} title={answer ? "what if" : "as recorded"}>A {signed(advantage)}{answer && "?"}</span>}
        {calls && <button class="quiet" onClick={(e) => { e.stopPropagation(); setRaw(!raw); }}>{raw ? "as cards" : "as written"}</button>}
        {turn.tokens && <button class="quiet" aria-pressed={byToken} onClick={(e) => { e.stopPropagation(); setByToken(!byToken); }}>log-prob gap</button>}
        <Copy text={whole(turn.text, { ...where, path: `turns/${m}/text` })} />
      </h4>
      {turn.tokens && byToken ? <Tokens tokens={turn.tokens} all={numbers.tokens} /> : prose && <Prose text={prose} math={!raw} />}
      <Cut text={turn.text} {...where} path={`turns/${m}/text`} />
      {turn.calls.map((call, c) => <Call {...{ call, c, m, where, open }} />)}
    </article>
  );
}

function Call({ call, c, m, where, open }) {
  const path = `turns/${m}/calls/${c}`;
  const output = start(call.output);
  return (
    <div class="call">
      <div class="bar-title"><b>{visible(call.name || "call")}</b>
        {call.error && <span class="tag bad">{call.error.replaceAll("_", " ")}</span>}<Copy text={whole(call.arguments, { ...where, path: `${path}/arguments` })} /></div>
      {start(call.arguments) !== "{}" && <Code text={start(call.arguments)} language={call.language} />}
      <Cut text={call.arguments} {...where} path={`${path}/arguments`} />
      {call.detail && <p class="note">{visible(call.detail)}</p>}
      {call.outcome === null || call.outcome === undefined ? <p class="note">never run: the trajectory ended here</p> : (
        <details class={`output ${call.outcome === "ok" ? "" : "failed"}`} open={open ?? output.length < 2000}>
          <summary>{call.outcome.replaceAll("_", " ")}{call.seconds !== null && call.seconds !== undefined && <span class="faint"> · {call.seconds.toFixed(3)} s</span>}</summary>
          <pre dir="auto">{output === "" ? <span class="faint">no output</span> : visible(output)}</pre>
          <Cut text={call.output} {...where} path={`${path}/output`} />
        </details>)}
    </div>
  );
}

// Every token shaded by how far the sampler's log-probability is from the actor's.
function Tokens({ tokens, all }) {
  return (
    <div class="prose tokens">
      {tokens.length < all && <p class="note">{tokens.length.toLocaleString("en")} of {all.toLocaleString("en")} tokens</p>}
      {tokens.map(([text, gap]) => (
        <span title={gap === null ? "no gap recorded" : `log p of the rollout − of the policy: ${signed(gap, 4)}`}
          style={gap ? { background: `color-mix(in srgb, var(--gap) ${Math.min(100, Math.round(Math.abs(gap) * 200))}%, transparent)` } : {}}>{visible(text)}</span>))}
    </div>
  );
}

const codeOf = (talk) => talk.turns.flatMap((turn) => turn.calls)
  .filter((call) => call.outcome && call.outcome !== "malformed" && call.outcome !== "over_limit").map((call) => start(call.arguments)).join("\n");

// Whom the shaped credit came from: the siblings that solved it, and how their code differs.
function Partners({ run, row, rows, talk }) {
  const [shown, setShown] = useState(null);
  const partner = rows.find((one) => one.id === shown);
  const [other] = useAnswer(() => (partner ? get(`api/${run.run}/conversation`, { id: partner.id }) : null), [shown]);
  const solved = rows.filter((one) => one.acc === 1 && one.code && !one.dropped);
  if (row.acc === 1 || row.acc === null || !row.code || !solved.length) return null;
  const similarity = (one) => row.similar?.[one.position];
  return (
    <div class="partners">
      <h4>Shaping compares its code with</h4>
      <p class="row">{solved.map((one) => (
        <button class={shown === one.id ? "chip on" : "chip"} onClick={() => setShown(shown === one.id ? null : one.id)}>
          sibling {one.at + 1}{similarity(one) !== undefined && ` · similarity ${similarity(one).toFixed(3)}`}</button>))}</p>
      {partner && other && <Diff from={codeOf(talk)} to={codeOf(other)} names={[`trajectory ${row.at + 1}, failed`, `sibling ${partner.at + 1}, solved`]} />}
    </div>
  );
}
