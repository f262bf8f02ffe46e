// What one turn's return is compared with, as far as the siblings of its group say it: for the ledger to compute it in place.

// The returns as [[sibling, [return, ...]], ...], without those that the mean leaves out, and their count, mean and
// sample standard deviation (of all, as the method has it). null where the pool is of more than this group, of no one
// pool, or weighs its returns. answers: {row: answer of the method's code}; count: of the pool, as that code says.
export function poolOf(rows, answers, row, k, settings, count) {
  if (!answers || !settings || !count || settings.bootstrap > 0) return null;
  const method = settings.estimator;
  const taking = rows.filter((one) => answers[one.id] && !answers[one.id].dropped);
  const all = (of) => taking.map((one) => [one, answers[one.id].turns.filter((_, m) => of(m)).map((turn) => turn.return)]);
  const [wanted, alone] = method === "gtpo" ? [{ group: () => true, turn: (m) => m === k }[settings.baseline], settings.leave_one_out]
    : method === "grpo" || method === "rloo" ? [(m) => m === 0, method === "rloo"] : [];
  if (!wanted) return null;
  const size = (pool) => pool.reduce((sum, [, values]) => sum + values.length, 0);
  // A turn's pool that is too small may have given way to the group's (sparse_turn).
  const pool = [all(wanted), all(() => method === "gtpo")].find((one) => size(one) === count);
  if (!pool) return null;
  const compared = pool.filter(([one, values]) => values.length && !(alone && one.id === row.id));
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const values = pool.flatMap(([, some]) => some), middle = mean(values);
  const std = values.length > 1 ? Math.sqrt(values.reduce((sum, v) => sum + (v - middle) ** 2, 0) / (values.length - 1)) : 0;
  return { lines: compared.map(([one, some]) => [one.at + 1, some]), mean: mean(compared.flatMap(([, some]) => some)), std };
}

// [the similarities that shape a failed trajectory's outcome, how many solved siblings they are divided by, the least
// outcome of these]; null where the record has not got one of the similarities.
export function shapedBy(rows, answers, row) {
  const solved = rows.filter((one) => one.acc === 1 && !(answers?.[one.id] ?? one).dropped);
  const close = solved.filter((one) => one.code).map((one) => row.similar?.[one.position]);
  return close.length && close.every((one) => one !== undefined) ? [close, solved.length, Math.min(...solved.map((one) => one.outcome))] : null;
}
