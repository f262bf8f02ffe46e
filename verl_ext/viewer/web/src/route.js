// The address after # is the whole state of the page: a link opens what its sender saw.
import { useEffect, useState } from "preact/hooks";

// What the address says now: an event may come before a change of it is drawn.
export const read = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

export function go(changes, { replace = false } = {}) {
  const next = { ...read(), ...changes };
  const kept = Object.entries(next).filter(([, value]) => value !== undefined && value !== null && value !== "");
  const hash = `#${new URLSearchParams(kept)}`;
  if (hash === location.hash) return;
  if (replace) {
    history.replaceState(null, "", hash);
    dispatchEvent(new HashChangeEvent("hashchange"));
  } else location.hash = hash;
}

export function useRoute() {
  const [route, setRoute] = useState(read);
  useEffect(() => {
    const changed = () => setRoute(read());
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  return route;
}

// The latest answer to a question that may change while it is being asked: [value, error, refreshing].
export function useAnswer(ask, inputs) {
  const [state, setState] = useState([null, null, true]);
  useEffect(() => {
    let wanted = true;
    setState(([value, error]) => [value, error, true]);
    Promise.resolve().then(ask).then(
      (value) => wanted && setState([value, null, false]),
      (error) => wanted && setState(([value]) => [value, error.message, false]),
    );
    return () => { wanted = false; };
  }, inputs);
  return state;
}
