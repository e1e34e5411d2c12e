-- The request that wrk sends, from the environment (BENCH_BODY names a file), and what came of it, as one line of JSON.
-- With BENCH_TIER every answer is looked into: header and body must name that tier.
local tier = os.getenv("BENCH_TIER")
local threads = {}

wrk.method = "POST"
wrk.body = io.open(os.getenv("BENCH_BODY"), "rb"):read("*a")
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer " .. os.getenv("BENCH_KEY")
for line in (os.getenv("BENCH_HEADERS") or ""):gmatch("[^\n]+") do
   local name, value = line:match("^(.-): (.*)$")
   wrk.headers[name] = value
end

function setup(thread)
   table.insert(threads, thread)
end

function init()
   checked, untrue = 0, 0
end

if tier then
   local stamp = '"service_tier":"' .. tier .. '"'
   function response(status, headers, body)
      checked = checked + 1
      if headers["x-service-tier"] ~= tier or not body:find(stamp, 1, true) then
         untrue = untrue + 1
      end
   end
end

function done(summary, latency)
   local checked, untrue = 0, 0
   for _, thread in ipairs(threads) do
      checked = checked + thread:get("checked")
      untrue = untrue + thread:get("untrue")
   end
   local e = summary.errors
   io.write(string.format(
      '{"requests":%d,"seconds":%.6f,"p50_s":%.6f,"p99_s":%.6f,"errors":%d,"checked":%d,"untrue":%d}\n',
      summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e6,
      latency:percentile(99) / 1e6, e.connect + e.read + e.write + e.status + e.timeout,
      checked, untrue))
end
