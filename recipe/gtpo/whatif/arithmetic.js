// The formulas of arithmetic.py for a page without a server, in the same order. A test compares the two.
//
//   recompute(rows, settings) -> one {dropped, shaped, turns: [{rewards, return, mean, divisor, count, advantage}]} a row
//
// Every similarity that shaping needs must be in rows[i].similar: the export puts it there. Throws where it could not.
"use strict";
globalThis.viewerCredit = (() => {
  const EPSILON = 1e-6, VARIANCE_EPSILON = 1e-8, RELATIVE_RANGE = 1e-6;
  const FAILED = new Set(["infra", "fault"]), TRUNCATED = new Set(["turn_limit", "length"]);
  const UNKNOWN = "shaping compares programs of this step whose similarity is not in this page: it could not be asked for when the page was written";
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

  // rewards.CHARGED, the other way round
  const UNCHARGED = { paper: new Set(["no_call_no_answer", "no_answer"]), strict: new Set() };
  const charged = (turn, s) => Boolean(turn.broken) && !UNCHARGED[s.format_rule].has(turn.broken);

  function shapedOutcomes(rows, members, s) {
    const shaped = new Map(members.map((i) => [i, rows[i].outcome]));
    if (!s["shaping.enable"] || s["shaping.alpha"] === 0) return shaped;
    for (const group of groupBy(members, (i) => rows[i].group).values()) {
      const solved = group.filter((i) => rows[i].acc === 1);
      const models = solved.filter((i) => rows[i].code);
      for (const i of group) {
        if (rows[i].acc === 1 || !rows[i].code || !models.length) continue;
        const similar = models.map((j) => rows[i].similar?.[j]);
        if (similar.includes(undefined)) throw new Error(UNKNOWN);
        const close = sum(similar.map((one) => Math.min(1, Math.max(0, one))));
        const start = Math.min(0, rows[i].outcome);
        const most = s["shaping.alpha"] * (Math.min(...solved.map((j) => rows[j].outcome)) - start);
        shaped.set(i, Math.max(rows[i].outcome, start + Math.min((s["shaping.alpha"] / solved.length) * close, most)));
      }
    }
    return shaped;
  }

  function turnRewards(row, shaped, s) {
    const last = row.turns.length - 1;
    const penalties = row.turns.map((turn) => (charged(turn, s) ? s.format_penalty : 0));
    const wellFormed = row.turns.every((turn) => !charged(turn, s));
    const whole = { sum: sum(penalties), min: Math.min(shaped, wellFormed ? 1 : 0) - shaped, outcome: 0 }[s.trajectory_reward];
    const byTurn = s.trajectory_reward === "sum" && s.turn_rewards;
    return row.turns.map((_, k) => ({
      outcome: k === last ? row.outcome : 0,
      shaping: k === last ? shaped - row.outcome : 0,
      format: byTurn ? penalties[k] : k === last ? whole : 0,
    }));
  }

  // states.state_values: mean and count of every entry, in the order of its row's turns.
  function stateValues(entries, { leave_one_out, state_prior, lone_state }) {
    const own = leave_one_out ? 1 : 0;
    const pools = groupBy(entries, (e) => e.state);
    const alone = (e) => e.turn > 0 && pools.get(e.state).length === 1;
    const strays = groupBy(entries.filter(alone), (e) => e.group);
    for (const turns of groupBy(entries, (e) => e.row).values()) {
      let before = 0;
      for (const e of turns) {
        const pool = pools.get(e.state), others = pool.length - own, weight = e.turn === 0 ? 0 : state_prior;
        const total = sum(pool.map((o) => o.value)) - own * e.value;
        let value = others > 0 ? (total + weight * before) / (others + weight) : before;
        const rest = lone_state === "lone" && alone(e) ? strays.get(e.group).filter((o) => !own || o.row !== e.row) : [];
        if (rest.length) value = sum(rest.map((o) => o.value)) / rest.length;
        Object.assign(e, { mean: f(value), count: others + own });
        before = value;
      }
    }
  }

  // states.bootstrap_returns: the target of every turn.
  function bootstrapReturns(turns, { gamma, bootstrap }) {
    const pools = groupBy(turns, (t) => t.state);
    for (const own of groupBy(turns, (t) => t.row).values()) {
      for (let k = own.length - 1, correction = 0; k >= 0; k--) {
        const pool = pools.get(own[k].state);
        const mean = sum(pool.map((t) => t.sampled)) / pool.length;
        own[k].target = f(own[k].sampled + correction);
        correction = gamma * ((1 - bootstrap) * correction + bootstrap * (mean - own[k].sampled));
      }
    }
  }

  // entries: [{row, turn, group, value}]. Adds mean, divisor, count and advantage, over the pool that `key` names.
  function compare(entries, s) {
    const { baseline = "group", scale = "std", leave_one_out = false, min_pool = 2, sparse_turn = "zero" } = s;
    const key = { turn: (e) => `${e.turn} ${e.group}`, batch: () => "" }[baseline] ?? ((e) => e.group);
    const statistics = (of) => {
      for (const pool of groupBy(entries, of).values()) {
        const values = pool.map((e) => e.value);
        const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
        const flat = high - low <= RELATIVE_RANGE * Math.max(Math.abs(high), Math.abs(low));
        const spread = values.length > 1 ? std(values) : 0;
        const total = sum(values);
        for (const own of groupBy(pool, (e) => e.row).values()) {
          const others = leave_one_out ? values.length - own.length : values.length;
          const rest = leave_one_out ? total - sum(own.map((e) => e.value)) : total;
          for (const e of own) {
            if (e.usable) continue;
            e.usable = values.length >= min_pool && others > 0;
            Object.assign(e, { count: e.count ?? values.length, mean: rest / Math.max(1, others), spread, flat });
          }
        }
      }
    };
    statistics(key);
    if (baseline === "state") stateValues(entries, s);
    if (baseline === "turn" && sparse_turn === "group") statistics((e) => e.group);
    const usable = entries.filter((e) => e.usable);
    for (const e of entries) {
      const target = e.target ?? e.value;
      const moved = Math.abs(target - e.value) > RELATIVE_RANGE * Math.abs(e.value);
      e.centred = e.usable && (moved || !e.flat) ? target - e.mean : 0;
    }
    const whole = scale === "batch_std" && usable.length > 1 ? std(usable.map((e) => e.centred)) + EPSILON : 1;
    for (const e of entries) {
      e.divisor = scale === "std" ? e.spread + EPSILON : whole;
      e.advantage = e.centred / e.divisor;
    }
    return entries;
  }

  // Centred and divided by the standard deviation over all tokens of the batch.
  function whiten(turns) {
    const tokens = sum(turns.map((t) => t.tokens));
    const values = turns.filter((t) => t.tokens > 0).map((t) => t.advantage);
    const low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    const flat = tokens < 2 || high - low <= RELATIVE_RANGE * Math.max(Math.abs(low), Math.abs(high));
    const mean = sum(turns.map((t) => t.tokens * t.advantage)) / tokens;
    const variance = sum(turns.map((t) => t.tokens * (t.advantage - mean) ** 2)) / (tokens - 1);
    for (const t of turns) t.advantage = flat ? 0 : (t.advantage - mean) / Math.sqrt(variance + VARIANCE_EPSILON);
  }

  // turns: [{row, turn, last, group, state, tokens, reward, return}] of all trajectories that take part.
  // Adds what each method makes of them; recipe/gtpo/method/estimators.py, by the same names.
  function evaluate(turns, trajectories, s) {
    const ofTrajectories = (value, options) => {
      const entries = compare(trajectories.map((t) => ({ row: t.row, turn: 0, group: t.group, value: f(value(t)) })), options);
      return new Map(entries.map((e) => [e.row, e]));
    };
    const returns = (gamma) => {
      for (const own of groupBy(turns, (t) => t.row).values()) {
        for (let k = own.length - 1, rest = 0; k >= 0; k--) {
          own[k].sampled = rest = own[k].reward + gamma * rest;
          own[k].value = f(rest);
        }
      }
    };
    const reward = (t) => t.total;
    const pooled = (options) => {
      const found = ofTrajectories(reward, options);
      for (const t of turns) {
        const { mean, divisor, count, advantage } = found.get(t.row);
        Object.assign(t, { mean, divisor, count, advantage });
      }
    };
    for (const t of turns) t.return = t.total; // of a rival: its trajectory's reward, in every turn
    const methods = {
      gtpo() {
        returns(s.gamma);
        if (s.bootstrap > 0) bootstrapReturns(turns, s);
        compare(turns, s);
        for (const t of turns) {
          t.return = t.target ?? t.value;
          if (s.unsolved_groups === "zero" && !t.groupSolved) t.advantage = 0;
        }
      },
      grpo: () => pooled({ scale: s.divide ? "std" : "none" }),
      rloo: () => pooled({ scale: "none", leave_one_out: true }),
      reinforce_plus_plus() {
        returns(1);
        for (const t of turns) t.advantage = t.value;
        whiten(turns);
      },
      recorded_gdpo() {
        const parts = [ofTrajectories((t) => t.shaped, {}), ofTrajectories((t) => (t.wellFormed ? 1 : 0), {})];
        for (const t of turns) t.advantage = f(sum(parts.map((part) => part.get(t.row).advantage)));
        whiten(turns);
      },
      mt_grpo() {
        const last = ofTrajectories((t) => t.lastReward, {});
        const before = turns.filter((t) => !t.last).map((t) => ({ ...t, value: f(t.reward), of: t }));
        for (const t of turns) t.advantage = last.get(t.row).advantage;
        for (const e of compare(before, { baseline: "turn" })) e.of.advantage += e.advantage;
      },
      gigpo() {
        const episode = ofTrajectories(reward, { scale: s.scale });
        returns(s.gamma);
        const steps = compare(turns.map((t) => ({ row: t, turn: 0, group: t.state, value: t.value, of: t })), { scale: s.scale });
        for (const e of steps) e.of.advantage = episode.get(e.of.row).advantage + e.advantage;
      },
    };
    methods[s.estimator]();
  }

  function recompute(rows, s) {
    const dropped = (row) => FAILED.has(row.finish) || (s.truncated === "drop" && TRUNCATED.has(row.finish));
    const real = (row) => row.acc !== null && row.turns.length > 0;
    const members = rows.map((_, i) => i).filter((i) => real(rows[i]) && !dropped(rows[i]));
    const shaped = shapedOutcomes(rows, members, s);
    const solvedGroups = new Set(members.filter((i) => rows[i].acc === 1).map((i) => rows[i].group));
    const answers = rows.map((row) => ({ dropped: real(row) && dropped(row), shaped: null, turns: [] }));
    const turns = [], trajectories = [];
    for (const i of members) {
      const { group, turns: own } = rows[i];
      const rewards = turnRewards(rows[i], shaped.get(i), s);
      const combined = rewards.map((r) => r.outcome + r.shaping + r.format);
      const total = sum(combined), update = rows[i].update ?? 0;
      const wellFormed = own.every((turn) => !charged(turn, s));
      trajectories.push({ row: i, update, group, total, shaped: shaped.get(i), wellFormed, lastReward: combined.at(-1) });
      own.forEach((turn, k) => turns.push({
        row: i, update, turn: k, last: k === own.length - 1, group, groupSolved: solvedGroups.has(group), total,
        state: JSON.stringify([group, ...own.slice(0, k).map((t) => t.said)]),
        tokens: turn.tokens - (turn.masked ?? 0), rewards: rewards[k], reward: combined[k],
      }));
      answers[i].shaped = shaped.get(i);
    }
    const ofTrajectories = groupBy(trajectories, (t) => t.update);
    for (const [update, own] of groupBy(turns, (t) => t.update)) evaluate(own, ofTrajectories.get(update), s);
    for (const { row, turn, rewards, return: value, mean = null, divisor = null, count = null, advantage } of turns) {
      answers[row].turns[turn] = { rewards, return: value, mean, divisor, count, advantage };
    }
    return answers;
  }

  return { recompute };
})();
