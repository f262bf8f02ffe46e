// Text that a model or a tool wrote. No HTML is ever made of it: text nodes, elements and their properties only.
import renderMathInElement from "katex/contrib/auto-render";
import { createLowlight } from "lowlight";
import json from "highlight.js/lib/languages/json";
import python from "highlight.js/lib/languages/python";
import { diffLines } from "diff";
import { useLayoutEffect, useRef, useState } from "preact/hooks";
import { exported, textUrl } from "./api.js";

const lowlight = createLowlight({ python, json });

// Characters that draw nothing or turn the text around them (bidi controls, ESC of terminal colours, tags, BOM).
const HIDDEN =
  /[\u0000-\u0008\u000B-\u001F\u007F-\u009F\u00AD\u061C\u180E\u200B\u200E\u200F\u2028-\u202E\u2060-\u206F\uFEFF\uFFF9-\uFFFB]|[\u{E0000}-\u{E007F}]/gu;

export const visible = (text) =>
  String(text).replace(HIDDEN, (c) => {
    const code = c.codePointAt(0);
    return code < 0x20 ? String.fromCharCode(0x2400 + code) : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });

// A text as the server hands it over: whole, or {text: its start, length}.
export const start = (text) => (text === null || text === undefined ? "" : typeof text === "string" ? text : text.text);

export function Cut({ text, run, id, path }) {
  if (typeof text !== "object" || text === null) return null;
  const size = text.length.toLocaleString("en");
  if (exported) return <p class="note">cut after {text.text.length.toLocaleString("en")} of {size} characters: the page was exported so</p>;
  return <p class="note">{text.text.length.toLocaleString("en")} of {size} characters. <a href={textUrl(run, id, path)} target="_blank" rel="noopener">The whole text</a></p>;
}

const DELIMITERS = [
  { left: "$$", right: "$$", display: true },
  { left: "\\[", right: "\\]", display: true },
  { left: "\\(", right: "\\)", display: false },
  { left: "$", right: "$", display: false },
];

export function Prose({ text, math = true }) {
  const at = useRef();
  useLayoutEffect(() => {
    at.current.textContent = visible(text);
    if (math) {
      // A formula that does not parse stays as it was written.
      const options = { delimiters: DELIMITERS, output: "mathml", throwOnError: true, errorCallback: () => {}, trust: false, maxSize: 20, maxExpand: 200, strict: "ignore" };
      renderMathInElement(at.current, options);
    }
  }, [text, math]);
  return <div class="prose" dir="auto" ref={at} />;
}

const nodes = (tree) => tree.map((node) =>
  node.type === "text" ? node.value : <span class={(node.properties?.className ?? []).join(" ")}>{nodes(node.children)}</span>);

export function Code({ text, language = "python" }) {
  return <pre class="code"><code>{nodes(lowlight.highlight(language, visible(text)).children)}</code></pre>;
}

export function Diff({ from, to, names }) {
  const parts = diffLines(from, to);
  return (
    <figure class="diff">
      <figcaption><span class="removed">− {names[0]}</span> <span class="added">+ {names[1]}</span></figcaption>
      <pre class="code">{parts.map((part) => (
        <span class={part.added ? "added" : part.removed ? "removed" : ""}>
          {part.value.replace(/\n$/, "").split("\n").map((line) => `${part.added ? "+" : part.removed ? "−" : " "} ${visible(line)}\n`)}
        </span>))}
      </pre>
    </figure>
  );
}

// The text for a copy: all of it where a server has it, also where the page shows its start only.
export const whole = (text, { run, id, path }) => (typeof text === "string" || !text || exported ? start(text)
  : async () => { const answer = await fetch(textUrl(run, id, path)); if (!answer.ok) throw new Error(answer.statusText); return answer.text(); });

export function Copy({ text, label = "copy" }) {
  const [said, setSaid] = useState(null);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(typeof text === "function" ? await text() : text);
      setSaid("copied");
    } catch { setSaid("not copied: the browser refuses it here"); }  // no clipboard outside of https and this machine
  };
  return <button class="quiet" onClick={(event) => { event.stopPropagation(); copy(); }} onBlur={() => setSaid(null)}>{said ?? label}</button>;
}
