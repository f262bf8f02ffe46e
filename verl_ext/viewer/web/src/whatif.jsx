// Other options, same record: the grid takes the colours that they would have given.

const same = (a, b) => Object.keys({ ...a, ...b }).every((name) => a[name] === b[name]);

// A whole other method, chosen beside the grid that it recolours.
// A method has no say in what is not in its preset: there the run keeps its own.
export function Methods({ overview, run, settings, change }) {
  const names = Object.keys(overview.presets), as = (name) => ({ ...run.settings, ...overview.presets[name] });
  const chosen = settings ? names.find((name) => same(as(name), settings)) ?? "other" : "";
  return (
    <label>what if{" "}
      <select aria-label="method" value={chosen} onChange={(e) => change(e.target.value ? as(e.target.value) : null)}>
        <option value="">as this run</option>
        {chosen === "other" && <option value="other">set below</option>}
        {names.map((name) => <option>{name}</option>)}
      </select>
      {settings && <button class="quiet" onClick={() => change(null)}>back to the record</button>}
    </label>
  );
}

export function WhatIf({ overview, run, settings, change, error }) {
  if (!overview.controls.length) return <section class="card"><h3>What if</h3><p class="note">No installed package answers what-if questions.</p></section>;
  const now = settings ?? run.settings;
  const set = (name, value) => change({ ...now, [name]: value });
  return (
    <section class="card whatif">
      <h3>What if</h3>
      {error && <p><strong class="bad">{error}</strong></p>}
      {!run.has_config && <p class="note">The run left no config.json: its settings are taken to be the defaults.</p>}
      <div class="controls">
        {overview.controls.map((control) => (
          <label class={settings && now[control.name] !== run.settings[control.name] ? "changed" : ""}>
            <span>{control.label}</span>
            {control.choices
              ? <select name={control.name} value={String(now[control.name])} onChange={(e) => set(control.name, control.choices.find((c) => String(c) === e.target.value))}>
                  {control.choices.map((choice) => <option value={String(choice)}>{choice === true ? "yes" : choice === false ? "no" : choice}</option>)}
                </select>
              : <span class="range"><input name={control.name} type="range" min={control.low} max={control.high} step={control.step} value={now[control.name]} onInput={(e) => set(control.name, Number(e.target.value))} />
                  <output>{now[control.name]}</output></span>}
          </label>))}
      </div>
    </section>
  );
}
