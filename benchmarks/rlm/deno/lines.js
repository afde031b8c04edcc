// readLines of https://deno.land/std@0.186.0/io/mod.ts, for machines that do not reach deno.land
export async function* readLines(reader) {
  const decoder = new TextDecoder(), bytes = new Uint8Array(65536);
  let rest = "";
  for (let size; (size = await reader.read(bytes)) !== null; ) {
    const lines = (rest + decoder.decode(bytes.subarray(0, size), { stream: true })).split("\n");
    rest = lines.pop();
    yield* lines;
  }
  if (rest) yield rest;
}
