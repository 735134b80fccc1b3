-- Counts the jobs of each shelf.
-- KEYS[1] the shelves
-- ARGV: 1 prefix, 2 least and 3 greatest instant of acceptance, as ZCOUNT takes them
-- Returns a list of {name of the shelf, number of jobs}.

local counts = {}
for _, name in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  counts[#counts + 1] = {name, redis.call('ZCOUNT', shelf_key(name), ARGV[2], ARGV[3])}
end
return counts
