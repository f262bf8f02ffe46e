// The formulas of arithmetic.py for a page without a server, in the same order. A test compares the two.
//
//   recompute(rows, settings) -> one {dropped, shaped, turns: [{rewards, return, mean, divisor, count, advantage}]} a row
//
// Every similarity that shaping needs must be in rows[i].similar: the export puts it there.
"use strict";
globalThis.viewerCredit = (() => {
  const EPSILON = 1e-6, RELATIVE_RANGE = 1e-6;
  const FAILED = new Set(["infra", "fault"]), TRUNCATED = new Set(["turn_limit", "length"]);
  const f = Math.fround; // returns are float32 in Python: what counts as equal must be the same here
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const std = (values) => {
    const mean = sum(values) / values.length;
    return Math.sqrt(sum(values.map((v) => (v - mean) ** 2)) / (values.length - 1));
  };
  const groupBy = (items, key) => {
    const groups = new Map();
    for (const item of items) {
      const label = key(item);
      if (!groups.has(label)) groups.set(label, []);
      groups.get(label).push(item);
    }
    return groups;
  };

  function shapedOutcomes(rows, members, s) {
    const shaped = new Map(members.map((i) => [i, rows[i].outcome]));
    if (!s["shaping.enable"] || s["shaping.alpha"] === 0) return shaped;
    for (const group of groupBy(members, (i) => rows[i].group).values()) {
      const solved = group.filter((i) => rows[i].acc === 1);
      const models = solved.filter((i) => rows[i].code);
      for (const i of group) {
        if (rows[i].acc === 1 || !rows[i].code || !models.length) continue;
        const close = sum(models.map((j) => Math.min(1, Math.max(0, rows[i].similar[j]))));
        shaped.set(i, Math.max(rows[i].outcome, (s["shaping.alpha"] / solved.length) * close));
      }
    }
    return shaped;
  }

  function turnRewards(row, shaped, s) {
    const last = row.turns.length - 1;
    const penalties = row.turns.map((turn) => (turn.broken ? s.format_penalty : 0));
    return row.turns.map((_, k) => ({
      outcome: k === last ? row.outcome : 0,
      shaping: k === last ? shaped - row.outcome : 0,
      format: s.turn_rewards ? penalties[k] : k === last ? sum(penalties) : 0,
    }));
  }

  // entries: [{row, turn, group, value}]. Adds mean, divisor, count (null where there is nothing to compare with),
  // and advantage.
  function normalize(entries, s, solvedGroups) {
    const statistics = (key) => {
      for (const pool of groupBy(entries, key).values()) {
        const values = pool.map((e) => e.value);
        const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
        const flat = high - low <= RELATIVE_RANGE * Math.max(Math.abs(high), Math.abs(low));
        const spread = values.length > 1 ? std(values) : 0;
        const total = sum(values);
        for (const [row, own] of groupBy(pool, (e) => e.row)) {
          const others = s.leave_one_out ? values.length - own.length : values.length;
          const rest = s.leave_one_out ? total - sum(own.map((e) => e.value)) : total;
          for (const e of own) {
            if (e.usable) continue;
            e.usable = values.length >= s.min_pool && others > 0;
            Object.assign(e, { count: values.length, mean: rest / Math.max(1, others), spread, flat });
          }
        }
      }
    };
    const key = { group: (e) => e.group, turn: (e) => `${e.turn} ${e.group}`, batch: () => "" }[s.baseline];
    statistics(key);
    if (s.baseline === "turn" && s.sparse_turn === "group") statistics((e) => e.group);
    const usable = entries.filter((e) => e.usable);
    for (const e of entries) e.centred = e.usable && !e.flat ? e.value - e.mean : 0;
    const whole = s.scale === "batch_std" && usable.length > 1 ? std(usable.map((e) => e.centred)) + EPSILON : 1;
    for (const e of entries) {
      e.divisor = s.scale === "std" ? e.spread + EPSILON : whole;
      e.advantage = e.centred / e.divisor;
      if (s.unsolved_groups === "zero" && !solvedGroups.has(e.group)) e.advantage = 0;
      if (!e.usable) e.mean = e.divisor = e.count = null;
    }
  }

  function recompute(rows, s) {
    const dropped = (row) => FAILED.has(row.finish) || (s.truncated === "drop" && TRUNCATED.has(row.finish));
    const real = (row) => row.acc !== null && row.turns.length > 0;
    const members = rows.map((_, i) => i).filter((i) => real(rows[i]) && !dropped(rows[i]));
    const shaped = shapedOutcomes(rows, members, s);
    const rewards = new Map(members.map((i) => [i, turnRewards(rows[i], shaped.get(i), s)]));
    const solvedGroups = new Set(members.filter((i) => rows[i].acc === 1).map((i) => rows[i].group));
    const byTurn = s.unit === "turn";
    const compared = byTurn
      ? s
      : { ...s, gamma: 1, baseline: "group", min_pool: 2, sparse_turn: "zero", unsolved_groups: "keep" };
    const entries = [];
    for (const i of members) {
      const own = rewards.get(i).map((r) => r.outcome + r.shaping + r.format);
      if (!byTurn) {
        entries.push({ row: i, turn: 0, group: rows[i].group, value: f(sum(own)) });
        continue;
      }
      for (let k = own.length - 1, rest = 0; k >= 0; k--) {
        rest = own[k] + s.gamma * rest;
        entries.push({ row: i, turn: k, group: rows[i].group, value: f(rest) });
      }
    }
    normalize(entries, compared, solvedGroups);
    const answers = rows.map((row) => ({ dropped: real(row) && dropped(row), shaped: null, turns: [] }));
    for (const i of members) answers[i].shaped = shaped.get(i);
    for (const e of entries) {
      for (let k = 0; k < rows[e.row].turns.length; k++) {
        if (byTurn && k !== e.turn) continue;
        const { value, mean, divisor, count, advantage } = e;
        answers[e.row].turns[k] = { rewards: rewards.get(e.row)[k], return: value, mean, divisor, count, advantage };
      }
    }
    return answers;
  }

  return { recompute };
})();
