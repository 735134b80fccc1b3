-- Puts packed rows in the place of an ended job's stream. Called once, or, if they are many, several times.
-- KEYS[1] the job record
-- ARGV: 1 prefix, 2 job id, 3 worker id, 4 attempt, 5 how many rows earlier calls have brought,
--       6 the length of the stream that the rows were made of, 7 its last id; '0' and any if more rows are to follow,
--       8.. id, name and payload of each row
-- Returns 'done' | 'more', or 'changed' without any change: the job has not ended, its last attempt is another one or
-- another worker's, or the stream, or what was brought before, is not what it should be.

local PACKING_MS = 60000 -- how long rows wait for those that follow

local stream, packing = stream_key(ARGV[2]), packing_key(ARGV[2])
local job = redis.call('HMGET', KEYS[1], 'status', 'worker', 'attempt')
if not is_terminal(job[1]) or job[2] ~= ARGV[3] or job[3] ~= ARGV[4] then return 'changed' end
if redis.call('XLEN', packing) ~= tonumber(ARGV[5]) then return 'changed' end
local left_ms, length = redis.call('PTTL', stream), tonumber(ARGV[6])
if left_ms <= 0 then return 'changed' end -- it has expired, and must not come back
if length > 0 then
  local last = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)
  if #last == 0 or last[1][1] ~= ARGV[7] or redis.call('XLEN', stream) ~= length then return 'changed' end
end

-- The append comes first: Redis may refuse it for want of memory, and then nothing has changed.
for i = 8, #ARGV, 3 do
  redis.call('XADD', packing, ARGV[i], ARGV[i + 1], ARGV[i + 2])
  redis.call('PEXPIRE', packing, PACKING_MS)
end
if length == 0 then return 'more' end
-- A copy takes no more room than it needs; behind a row that was appended, Redis keeps up to 4 KiB free.
redis.call('COPY', packing, stream, 'REPLACE')
redis.call('PEXPIRE', stream, int(left_ms))
redis.call('UNLINK', packing)
return 'done'
