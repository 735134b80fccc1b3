-- Notes what became of an attempt to deliver a webhook, and when it is tried again, if it is.
-- KEYS[1] the webhook of the job
-- ARGV: 1 prefix, 2 job id, 3 attempt, 4 what became of it, JSON, 5 'delivered' | 'given_up' | 'pending', 6 with
--       'pending': how long until the next attempt, in ms, otherwise the retention in ms
-- Returns 1, or 0 if it makes no difference any more: the webhook has expired or was settled, or a later attempt decides.

even_without_memory()
local id, attempt, state = ARGV[2], ARGV[3], ARGV[5]
local hook = redis.call('HMGET', KEYS[1], 'state', 'attempts')
if hook[1] ~= 'pending' then return 0 end
redis.call('HSET', KEYS[1], 'result:' .. attempt, ARGV[4])
if state == 'pending' then
  if hook[2] ~= attempt then return 0 end
  redis.call('ZADD', webhooks, 'XX', int(now_ms() + tonumber(ARGV[6])), id)
else
  redis.call('HSET', KEYS[1], 'state', state)
  redis.call('ZREM', webhooks, id)
  redis.call('PEXPIRE', KEYS[1], ARGV[6])
end
return 1
