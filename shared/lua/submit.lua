-- Accepts a job, once, in one round trip.
-- KEYS[1] the job record
-- ARGV: 1 prefix, 2 job id, 3 session key or '', 4 arq's job payload, 5 the request, 6 queue timeout in ms,
--       7 time to live of an unfinished job in ms, 8 most unfinished jobs, 9 most turns of a session,
--       10 name of a request that may come twice or '', 11 digest of its body, 12 when it joins the job of the one
--       before: 'always' | 'unless_failed' | 'never', 13 how many arguments describe the webhook, 0: the job has none,
--       14 its time to live in ms, then its fields and values, then fields and values of the record
-- Returns {'accepted', job id, accepted ms}, or without a new job: {'duplicate' | 'joined', job id, accepted ms} |
-- 'other_body' | 'queue_full' | 'session_full'.

local id, session, ttl_ms, once = ARGV[2], ARGV[3], ARGV[7], ARGV[10]
local accepted_ms = redis.call('HGET', KEYS[1], 'accepted_ms')
if accepted_ms then return {'duplicate', id, accepted_ms} end

-- The same request may have come before: its answer never reached the client.
local before_id, digest
if once ~= '' and ARGV[12] ~= 'never' then
  before_id, digest = string.match(redis.call('GET', once_key(once)) or '', '^(%S+) (%S+)$')
end
local before = before_id and redis.call('HMGET', job_key(before_id), 'status', 'accepted_ms', 'waiters', 'deadline_ms')
if before and before[1] then
  local status = before[1]
  if digest ~= ARGV[11] then return 'other_body' end
  if ARGV[12] == 'always' or status == 'queued' or status == 'running' or status == 'succeeded' then
    -- Counted once, however often this submission is sent; and who comes later may wait longer.
    if before[3] and not is_terminal(status) and redis.call('HSETNX', job_key(before_id), 'waiter:' .. id, '1') == 1 then
      redis.call('HINCRBY', job_key(before_id), 'waiters', 1)
      local deadline = now_ms() + tonumber(ARGV[6])
      if status == 'queued' and deadline > tonumber(before[4]) then
        redis.call('HSET', job_key(before_id), 'deadline_ms', int(deadline))
        redis.call('ZADD', deadlines, int(deadline), before_id)
        for _, of_job in ipairs({job_key, request_key, attachments_key, arq_job_key, stream_key}) do
          redis.call('PEXPIRE', of_job(before_id), ttl_ms)
        end
        redis.call('PEXPIRE', turns_key(redis.call('HGET', job_key(before_id), 'session')), ttl_ms)
      end
    end
    return {'joined', before_id, before[2]}
  end
end

if redis.call('ZCARD', deadlines) >= tonumber(ARGV[8]) then return 'queue_full' end
if session ~= '' and redis.call('LLEN', turns_key(session)) >= tonumber(ARGV[9]) then return 'session_full' end

local now = now_ms()
local at, deadline = int(now), int(now + tonumber(ARGV[6]))
redis.call('HSET', KEYS[1], 'status', 'queued', 'session', session, 'attempt', '0', 'worker', '',
           'accepted_ms', at, 'deadline_ms', deadline, unpack(ARGV, 14 + tonumber(ARGV[13])))
redis.call('PEXPIRE', KEYS[1], ttl_ms)
if ARGV[13] ~= '0' then
  redis.call('HSET', webhook_key(id), unpack(ARGV, 15, 13 + tonumber(ARGV[13])))
  redis.call('PEXPIRE', webhook_key(id), ARGV[14])
end
redis.call('SET', request_key(id), ARGV[5], 'PX', ttl_ms)
redis.call('PEXPIRE', attachments_key(id), ttl_ms)
redis.call('SET', arq_job_key(id), ARGV[4], 'PX', ttl_ms)
redis.call('ZADD', deadlines, deadline, id)
if once ~= '' then redis.call('SET', once_key(once), id .. ' ' .. ARGV[11], 'PX', ttl_ms) end

local job, lasts_ms = {}, tonumber(ttl_ms)
for i = 14 + tonumber(ARGV[13]), #ARGV, 2 do job[ARGV[i]] = ARGV[i + 1] end
put_on_shelf(shelf_of(job.tenant, job.kind, job.store, 'queued', '', job.model), id, at, lasts_ms)
if session ~= '' then put_among(session_jobs_key(session), id, at, lasts_ms) end
put_among_pairs(job.tenant, job.pairs, id, at, lasts_ms)

if session == '' then
  make_claimable(id, now)
else
  local turns = turns_key(session)
  redis.call('RPUSH', turns, id)
  redis.call('PEXPIRE', turns, ttl_ms)
  local head = redis.call('LINDEX', turns, 0)
  if head == id or redis.call('EXISTS', job_key(head)) == 0 then promote_next_turn(turns, now) end
end
return {'accepted', id, at}
