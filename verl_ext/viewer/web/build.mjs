// Builds ../static from ./src: npm ci && npm run build. The result is committed, so that nobody needs node to install it.
// sources.json names the hash of every source: a test compares it, so that a change without a build is seen.
import { createHash } from "node:crypto";
import { copyFileSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

const out = "../static";
await build({
  entryPoints: { app: "src/main.jsx", style: "src/style.css" },
  bundle: true,
  minify: true,
  format: "iife",
  target: "es2022",
  jsx: "automatic",
  jsxImportSource: "preact",
  charset: "utf8",
  legalComments: "none",
  outdir: out,
});
copyFileSync("src/index.html", `${out}/index.html`);
for (const name of ["app.js", "style.css"]) {
  const path = `${out}/${name}`;
  // A closing tag inside a string would end the script of an exported page.
  writeFileSync(path, readFileSync(path, "utf8").replaceAll("</script", "<\\/script").trimEnd() + "\n");
}

const packages = ["preact", "lowlight", "highlight.js", "katex", "uplot", "diff", "devlop"];
const notices = packages.map((name) => {
  const folder = `node_modules/${name}`;
  const { version, license } = JSON.parse(readFileSync(`${folder}/package.json`, "utf8"));
  const file = readdirSync(folder).find((one) => /^licen[sc]e/i.test(one));
  return `${name} ${version} (${license})\n\n${readFileSync(`${folder}/${file}`, "utf8").trim().replace(/[ \t]+$/gm, "")}\n`;
});
writeFileSync(`${out}/LICENSES.txt`, `app.js and style.css contain:\n\n${notices.join(`\n${"-".repeat(80)}\n\n`)}`);

const sources = ["build.mjs", "package.json", "package-lock.json", ...readdirSync("src").sort().map((name) => `src/${name}`)];
const hashes = Object.fromEntries(sources.map((path) => [path, createHash("sha256").update(readFileSync(path)).digest("hex")]));
writeFileSync(`${out}/sources.json`, `${JSON.stringify(hashes, null, 1)}\n`);
