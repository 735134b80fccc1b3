-- Gives a worker webhooks that are due, each for one attempt. If the worker does not settle it, others try again.
-- KEYS[1] the webhooks
-- ARGV: 1 prefix, 2 most webhooks to give, 3 most that the worker may have on their way to one host, 4 how long an attempt
--       is the worker's own, in ms, 5 most attempts, 6 retention in ms, 7.. hosts that the worker is sending to, each with
--       the number of webhooks on their way there
-- Returns {1 if more may be due, else 0, list of {job id, attempt, started ms, kind, url, secret, status, marker, ended
-- ms}, ids of those that are given up, since nobody settled their last attempt}.

-- A busy host's webhooks make room for those of others: each time for twice as long, so that they do not come up again
-- and again while an endpoint hangs.
local LOOK_AT, FIRST_WAIT_MS, LONGEST_WAIT_MS = 100, 250, 60000

local now, on_their_way, claimed, given_up = now_ms(), {}, {}, {}
for i = 7, #ARGV, 2 do on_their_way[ARGV[i]] = tonumber(ARGV[i + 1]) end

local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', int(now), 'LIMIT', 0, LOOK_AT)
for _, id in ipairs(due) do
  if #claimed >= tonumber(ARGV[2]) then break end
  local key = webhook_key(id)
  local hook = redis.call('HMGET', key, 'state', 'attempts', 'host', 'kind', 'url', 'secret', 'status', 'marker', 'ended_ms')
  local attempt, host = tonumber(hook[2] or '0') + 1, hook[3]
  if hook[1] ~= 'pending' then -- it has expired
    redis.call('ZREM', KEYS[1], id)
  elseif attempt > tonumber(ARGV[5]) then
    redis.call('ZREM', KEYS[1], id)
    redis.call('HSET', key, 'state', 'given_up')
    redis.call('PEXPIRE', key, ARGV[6])
    given_up[#given_up + 1] = id
  elseif (on_their_way[host] or 0) >= tonumber(ARGV[3]) then
    local waits = redis.call('HINCRBY', key, 'waits', 1)
    redis.call('ZADD', KEYS[1], int(now + math.min(FIRST_WAIT_MS * 2 ^ waits, LONGEST_WAIT_MS)), id)
  else
    redis.call('HSET', key, 'attempts', int(attempt), 'started_ms:' .. int(attempt), int(now), 'waits', '0')
    redis.call('ZADD', KEYS[1], int(now + tonumber(ARGV[4])), id)
    on_their_way[host] = (on_their_way[host] or 0) + 1
    claimed[#claimed + 1] = {id, int(attempt), int(now), hook[4], hook[5] or '', hook[6] or '', hook[7], hook[8], hook[9]}
  end
end
return {#due == LOOK_AT and 1 or 0, claimed, given_up}
