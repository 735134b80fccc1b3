-- Accepts a job, once, in one round trip.
-- KEYS[1] the job record
-- ARGV: 1 prefix, 2 job id, 3 session key or '', 4 arq's job payload, 5 the request, 6 queue timeout in ms,
--       7 time to live of an unfinished job in ms, 8 most unfinished jobs, 9 most turns of a session,
--       10.. fields and values of the record
-- Returns {'accepted', accepted ms}, or without any change: {'duplicate', its accepted ms} | 'queue_full' | 'session_full'.

local id, session, ttl_ms = ARGV[2], ARGV[3], ARGV[7]
local accepted_ms = redis.call('HGET', KEYS[1], 'accepted_ms')
if accepted_ms then return {'duplicate', accepted_ms} end
if redis.call('ZCARD', deadlines) >= tonumber(ARGV[8]) then return 'queue_full' end
if session ~= '' and redis.call('LLEN', turns_key(session)) >= tonumber(ARGV[9]) then return 'session_full' end

local now = now_ms()
local deadline = now + tonumber(ARGV[6])
redis.call('HSET', KEYS[1], 'status', 'queued', 'session', session, 'attempt', '0', 'worker', '',
           'accepted_ms', int(now), 'deadline_ms', int(deadline), unpack(ARGV, 10))
redis.call('PEXPIRE', KEYS[1], ttl_ms)
redis.call('SET', request_key(id), ARGV[5], 'PX', ttl_ms)
redis.call('PEXPIRE', attachments_key(id), ttl_ms)
redis.call('SET', arq_job_key(id), ARGV[4], 'PX', ttl_ms)
redis.call('ZADD', deadlines, int(deadline), id)

if session == '' then
  make_claimable(id, now)
else
  local turns = turns_key(session)
  redis.call('RPUSH', turns, id)
  redis.call('PEXPIRE', turns, ttl_ms)
  local head = redis.call('LINDEX', turns, 0)
  if head == id or redis.call('EXISTS', job_key(head)) == 0 then promote_next_turn(turns, now) end
end
return {'accepted', int(now)}
