-- Ends a job from inside of its attempt.
-- KEYS[1] the job record
-- ARGV: 1 prefix, 2 job id, 3 worker id, 4 attempt, 5 sequence of the marker, 6 'ok' | 'error', 7 the marker's payload,
--       8 status, 9 retention in ms, 10 '1' if the agent has stopped, so that the job is released with its end,
--       11 with an 'ok' the new session state, or '' to leave it as it is, 12 its time to live in ms, 0: for ever,
--       13 when the entries were said, or '', 14.. more fields and values of the record
-- Returns 'done', or without any change: 'fenced' (another attempt, another worker, or an end came first) | 'gone'
-- (no record) | 'incomplete' (the attempt is not whole in the stream).

local id, worker, attempt, kind = ARGV[2], ARGV[3], ARGV[4], ARGV[6]
local job = look_up(id)
if not job.status then return 'gone' end
if job.status ~= 'running' or job.worker ~= worker or job.attempt ~= attempt then return 'fenced' end
local last = redis.call('XREVRANGE', stream_key(id), '+', '-', 'COUNT', 1)
local said = tonumber(ARGV[5]) - 1
local whole = #last == 1 and last[1][1] == attempt .. '-' .. int(said)
  and redis.call('XLEN', stream_key(id)) == tonumber(attempt) + said -- each attempt so far has one opening
if not whole then return 'incomplete' end

even_without_memory()
local now = now_ms()
end_job(id, job, attempt .. '-' .. ARGV[5], kind, ARGV[7], ARGV[8], now, ARGV[9], unpack(ARGV, 14))
if ARGV[13] ~= '' then redis.call('SET', times_key(id), ARGV[13], 'PX', ARGV[9]) end
local session, state = job.session, ARGV[11]
if kind == 'ok' and session ~= '' then
  if state ~= '' then redis.call('SET', session_key(session), state) end
  if ARGV[12] ~= '0' then redis.call('PEXPIRE', session_key(session), ARGV[12]) end
end
if ARGV[10] == '1' then release(id, job, now) else await_release(id, now) end
return 'done'
