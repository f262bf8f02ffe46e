// Where the page's data comes from: the server, or the page itself when it was exported.
// get(path, parameters) answers what the paths of ../../app.py answer.
import { embedded } from "./embedded.js";

export const exported = document.getElementById("data") !== null;
const local = exported ? embedded() : null;

export async function get(path, parameters = {}) {
  if (local) return (await local)(path, parameters);
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    for (const one of Array.isArray(value) ? value : [value]) if (one !== undefined && one !== null) query.append(name, one);
  }
  const answer = await fetch(`${path}?${query}`);
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}

export const textUrl = (run, id, path) => `api/${run}/text?${new URLSearchParams({ id, path })}`;
