// The balance of each layer, from counts of selections: as moescope.analysis defines it.

/** Return {total, entropy (normalized), maxViolation, active} of counts of one layer; NaN of none. */
export function balanceOf(counts) {
  let total = 0, most = 0, active = 0;
  for (const value of counts) {
    total += value;
    if (value > most) most = value;
    if (value > 0) active += 1;
  }
  let bits = 0;
  for (const value of counts) if (value > 0) bits -= (value / total) * Math.log2(value / total);
  return {
    total,
    active,
    entropy: total ? bits / Math.log2(Math.max(counts.length, 2)) : NaN,
    maxViolation: total ? (most / total) * counts.length - 1 : NaN,
  };
}

/** Return the entropy of weights over its maximum, 0 to 1. */
export function weightsEntropy(weights) {
  const sum = weights.reduce((a, b) => a + b, 0);
  let bits = 0;
  for (const weight of weights) if (weight > 0) bits -= (weight / sum) * Math.log2(weight / sum);
  return sum > 0 ? Math.max(bits, 0) / Math.log2(Math.max(weights.length, 2)) : NaN;
}
