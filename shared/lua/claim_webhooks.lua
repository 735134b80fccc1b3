-- Gives a worker webhooks that are due, each for one attempt. If the worker does not settle it, others try again.
-- KEYS[1] the webhooks
-- ARGV: 1 prefix, 2 most webhooks to give, 3 most that the worker may have on their way to one host, 4 most to URLs that
--       one tenant has named, 5 how long an attempt is the worker's own, in ms, 6 most attempts, 7 retention in ms,
--       8.. hosts, and `tenant T`, that the worker is sending to and for, each with the number of webhooks on their way
-- Returns {1 if more are due, else 0, list of {job id, attempt, started ms, kind, url, secret, status, marker, ended ms,
-- tenant}, ids of those that are given up, since nobody settled their last attempt}.

-- The webhooks of a busy host, and those of a tenant that has its share, are passed over. Where so many are due that others behind them are not seen, they step
-- back for a moment.
local LOOK_AT, STEP_BACK_MS = 1000, 2000

local now, on_their_way, claimed, given_up, passed_over = now_ms(), {}, {}, {}, {}
for i = 8, #ARGV, 2 do on_their_way[ARGV[i]] = tonumber(ARGV[i + 1]) end

local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', int(now), 'LIMIT', 0, LOOK_AT)
local is_full = false
for _, id in ipairs(due) do
  is_full = #claimed >= tonumber(ARGV[2])
  if is_full then break end
  local key = webhook_key(id)
  local hook = redis.call('HMGET', key, 'state', 'attempts', 'host', 'tenant')
  local attempt, host = tonumber(hook[2] or '0') + 1, hook[3]
  local of_tenant = host ~= '' and 'tenant ' .. (hook[4] or '') or nil -- the deployment's own endpoint is everybody's
  if hook[1] ~= 'pending' then -- it has expired
    redis.call('ZREM', KEYS[1], id)
  elseif attempt > tonumber(ARGV[6]) then
    redis.call('ZREM', KEYS[1], id)
    redis.call('HSET', key, 'state', 'given_up')
    redis.call('PEXPIRE', key, ARGV[7])
    given_up[#given_up + 1] = id
  elseif (on_their_way[host] or 0) >= tonumber(ARGV[3])
    or (of_tenant and (on_their_way[of_tenant] or 0) >= tonumber(ARGV[4])) then
    passed_over[#passed_over + 1] = id
  else
    redis.call('HSET', key, 'attempts', int(attempt), 'started_ms:' .. int(attempt), int(now))
    redis.call('ZADD', KEYS[1], int(now + tonumber(ARGV[5])), id)
    on_their_way[host] = (on_their_way[host] or 0) + 1
    if of_tenant then on_their_way[of_tenant] = (on_their_way[of_tenant] or 0) + 1 end
    local told = redis.call('HMGET', key, 'kind', 'url', 'secret', 'status', 'marker', 'ended_ms')
    claimed[#claimed + 1] = {id, int(attempt), int(now), told[1], told[2] or '', told[3] or '', told[4], told[5], told[6],
                              hook[4] or ''}
  end
end

local are_hidden = #due == LOOK_AT and not is_full
if are_hidden then
  for _, id in ipairs(passed_over) do redis.call('ZADD', KEYS[1], int(now + STEP_BACK_MS), id) end
end
return {(is_full or are_hidden or #passed_over > 0) and 1 or 0, claimed, given_up}
