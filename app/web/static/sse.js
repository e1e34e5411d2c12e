// Server-sent events of an answer, as they come.

/** Yield the data of each event of a stream of bytes. Comments are left out. */
export async function* events(stream) {
  let rest = "";
  for await (const piece of pieces(stream)) {
    const blocks = (rest + piece).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    yield* blocks.map(data).filter((text) => text !== null);
  }
}

async function* pieces(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

function data(block) {
  const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  return lines.length ? lines.map((line) => line.slice(5).trimStart()).join("\n") : null;
}
