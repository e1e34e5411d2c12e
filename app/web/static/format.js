// Numbers and times as people read them.

export const seconds = (value) => {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  if (value < 1) return `${(1000 * value).toPrecision(value < 0.01 ? 2 : 3).replace(/\.0+$/, "")} ms`;
  return `${value < 100 ? value.toFixed(value < 10 ? 2 : 1) : Math.round(value)} s`;
};

export const count = (value) => (value >= 1e6 ? `${(value / 1e6).toFixed(1)}M` : value >= 1e4 ? `${(value / 1e3).toFixed(0)}k` : `${Math.round(value)}`);

export const rate = (value) => (value === 0 ? "0" : value < 10 ? `${Number(value.toPrecision(2))}` : count(value));

export const money = (value) => {
  const amount = Number(value);
  if (amount === 0) return "0";
  return amount < 0.01 ? amount.toPrecision(2).replace(/e-0?(\d+)/, "e-$1") : amount.toFixed(amount < 10 ? 4 : 2);
};

// Rounded down: 99.996 % is not all, and 98.999 % is not 99 %.
export const percent = (share) => `${Math.floor(1e4 * share + 1e-6) / 100} %`;

export const words = (name) => name.replaceAll("_", " ");

export const time = (unix) => new Date(1000 * unix).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
